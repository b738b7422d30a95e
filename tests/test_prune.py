"""Pruning zeroes what it was asked to, never everything; a training keeps the zeros; heads go by what they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from softlabels.cache import open_cache
from softlabels.cache.format import TEMPORARY
from softlabels.cli import main
from softlabels.config import DumpOptions, PruneOptions, StudentOptions, build_options
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.errors import ConfigError, StudentError
from softlabels.heads import find_attention, remove_zero_heads, weigh_heads
from softlabels.prune import prune, weigh_by_gradients
from softlabels.pruning import count_nonzero, find_matrices, prune_by_magnitude
from softlabels.runs import Run, load_run
from softlabels.students import student_inputs
from softlabels.train import train_student
from softlabels.types import Example
from tests.models import LABEL_NAMES, TEXTS, save_teacher

LSTM = {"embedding_dim": 16, "hidden_size": 12, "fc_size": 10}
BERT = {"layers": 2, "hidden_size": 32, "heads": 4}
ROWS = [Example(str(i), text, None, name) for i, (text, name) in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its cache, and a BiLSTM and a BERT that were trained from it."""
    folder = tmp_path_factory.mktemp("prune")
    teacher = save_teacher(folder / "teacher")
    dump(Corpus("made", None, ROWS, LABEL_NAMES), teacher=str(teacher), out=folder / "cache", options=DumpOptions())
    train(folder, "bilstm", options=LSTM)
    train(folder, "bert", student="transformer", options=BERT)
    return folder


def train(place: Path, name: str, *, student: str = "bilstm", **changes: Any) -> Path:
    values = {"student": student, "losses": {"kl": 0.5, "ce": 0.5}, "epochs": 2, "lr": 1e-2, "batch_size": 16}
    options = StudentOptions.model_validate(values | changes)
    train_student(open_cache(place / "cache"), out=place / name, options=options, cpu=True)
    return place / name


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return {name: values for name, values in load_file(run / "model.safetensors").items() if values.ndim >= 2}


def network(run: Run) -> nn.Module:
    assert isinstance(run.student, nn.Module)
    return run.student


# ------------------------------------------------------------------------------------------------------------ magnitude


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("name", ["bilstm", "bert"])
def test_the_smallest_of_every_matrix_go(place: Path, tmp_path: Path, name: str, share: float) -> None:
    report = prune(place / name, out=tmp_path / "out", options=PruneOptions(magnitude=share))
    before, after = weights_of(place / name), weights_of(tmp_path / "out")
    for key, values in before.items():
        gone = after[key] == 0
        assert int(gone.sum()) == pytest.approx(max(share * values.numel(), int((values == 0).sum())), abs=1), key
        assert values[gone].abs().max() <= values[~gone].abs().min()
        assert torch.equal(after[key][~gone], values[~gone])
    run = load_run(tmp_path / "out")
    assert report.nonzero == run.nonzero < report.parameters == run.parameters
    assert report.zeros == pytest.approx(share, abs=0.05)
    assert run.record.pruned is not None and run.record.pruned.magnitude == share
    assert run.logits(ROWS[:3]).shape == (3, 3)


def test_of_all_matrices_together(place: Path, tmp_path: Path) -> None:
    prune(place / "bert", out=tmp_path / "out", options=PruneOptions(magnitude=0.5, scope="all"))
    before, after = weights_of(place / "bert"), weights_of(tmp_path / "out")
    every = torch.cat([values.flatten() for values in before.values()])
    zeros = {key: float((values == 0).float().mean()) for key, values in after.items()}
    assert sum(int((values == 0).sum()) for values in after.values()) == round(0.5 * len(every))
    assert max(zeros.values()) - min(zeros.values()) > 0.2  # not the same of each
    gone = torch.cat([values.flatten() for values in after.values()]) == 0
    assert every[gone].abs().max() <= every[~gone].abs().min()


def test_equal_weights_are_counted_too() -> None:
    layer = nn.Linear(10, 10, bias=False)
    nn.init.constant_(layer.weight, 0.5)
    prune_by_magnitude(layer, 0.37)
    assert int((layer.weight == 0).sum()) == 37


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adadelta"])
@pytest.mark.parametrize("name", ["bilstm", "bert"])
def test_a_training_keeps_the_zeros(place: Path, tmp_path: Path, name: str, optimizer: str) -> None:
    prune(place / name, out=tmp_path / "sparse", options=PruneOptions(magnitude=0.6))
    student = load_run(place / name).record.student
    again = train(
        place, str(tmp_path / "again"), student=student, from_run=str(tmp_path / "sparse"), optimizer=optimizer, lr=0.1
    )
    sparse, trained = weights_of(tmp_path / "sparse"), weights_of(again)
    assert all(bool((trained[key][values == 0] == 0).all()) for key, values in sparse.items())
    moved = [key for key, values in sparse.items() if not torch.equal(values, trained[key])]
    assert len(moved) == len(sparse)
    record = load_run(again).record
    assert record.pruned is not None and record.pruned.magnitude == 0.6
    assert record.options == load_run(place / name).record.options


def test_without_pruning_a_training_from_a_run_goes_on_with_everything(place: Path, tmp_path: Path) -> None:
    before = weights_of(place / "bert")
    again = train(
        place, str(tmp_path / "again"), student="transformer", from_run=str(place / "bert"), lr=1e-6, epochs=1
    )
    after = weights_of(again)
    assert all((before[key] - after[key]).abs().max() < 1e-4 for key in before)  # it did start there
    assert load_run(again).record.pruned is None


@pytest.mark.parametrize(
    ("student", "options", "asked"),
    [
        ("bilstm", LSTM, {"magnitude": 0.5}),
        ("transformer", BERT, {"heads": 0.5}),
        ("transformer", {"init_from": "TEACHER"}, {"magnitude": 0.3, "heads": 0.25}),
    ],
)
def test_pruned_before_the_first_step(
    place: Path, tmp_path: Path, student: str, options: dict[str, Any], asked: dict[str, float]
) -> None:
    """The other order: prune what the student starts as, then distil."""
    chosen = {key: str(place / "teacher") if value == "TEACHER" else value for key, value in options.items()}
    run = load_run(train(place, str(tmp_path / "out"), student=student, options=chosen, prune=asked))
    pruned = run.record.pruned
    assert pruned is not None and pruned.magnitude == asked.get("magnitude")
    if "magnitude" in asked:
        for key, parameter in find_matrices(network(run)).items():
            share = float((parameter == 0).float().mean())
            assert share >= asked["magnitude"] - 1 / parameter.numel(), key
    zero = [
        f"{layer + 1}.{head + 1}"
        for layer, attention in enumerate(find_attention(network(run)) if "heads" in asked else [])
        for head in range(attention.heads)
        if attention.is_zero(head)
    ]
    assert zero == pruned.heads and len(zero) == round(8 * asked.get("heads", 0))


def test_a_resumed_training_keeps_them_too(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from softlabels import train as train_module

    save = train_module.save_checkpoint

    def stop(out: Path, *rest: Any) -> None:
        save(out, *rest)
        raise KeyboardInterrupt

    options = StudentOptions.model_validate(
        {"student": "bilstm", "options": LSTM, "prune": {"magnitude": 0.5}, "epochs": 3, "lr": 1e-2, "batch_size": 16}
    )
    cache = open_cache(place / "cache")
    train_student(cache, out=tmp_path / "whole", options=options, cpu=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(train_module.__dict__, "save_checkpoint", stop)
        train_student(cache, out=tmp_path / "resumed", options=options, cpu=True)
    train_student(cache, out=tmp_path / "resumed", options=options, resume=True, cpu=True)
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "resumed")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


# ---------------------------------------------------------------------------------------------------------------- heads


def test_gradients_are_those_of_a_factor_on_each_head(place: Path) -> None:
    """The importance is |∂loss/∂ξ| of Michel et al. (2019), here by a small change of ξ, row by row."""
    run, cache = load_run(place / "bert"), open_cache(place / "cache")
    student = network(run).double()
    found = weigh_by_gradients(run, cache, rows=6)
    layers = find_attention(student)
    sums = torch.zeros(2, 4, dtype=torch.float64)
    batch = cache.batch(torch.arange(6).numpy(), ["logits"])
    target = batch.teacher.logits.double().softmax(-1)

    def losses() -> torch.Tensor:
        return -(target * student(**student_inputs(run.student, batch.tokens)).logits.log_softmax(-1)).sum(-1)  # type: ignore[arg-type]

    with torch.no_grad():
        for number, attention in enumerate(layers):
            for head in range(4):
                columns = attention.output.weight[:, attention.span(head)]
                kept, step = columns.clone(), 1e-5
                ends = []
                for factor in (1 + step, 1 - step):
                    columns.copy_(kept * factor)
                    ends.append(losses())
                columns.copy_(kept)
                sums[number, head] = ((ends[0] - ends[1]) / (2 * step)).abs().sum()
    expected = sums / sums.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-3)


def test_the_heads_that_matter_least_go(place: Path, tmp_path: Path) -> None:
    cache = open_cache(place / "cache")
    importance = weigh_by_gradients(load_run(place / "bert"), cache)
    report = prune(place / "bert", out=tmp_path / "out", options=PruneOptions(heads=0.25), cache=cache)
    least = sorted(
        (importance[index // 4, index % 4].item(), f"{index // 4 + 1}.{index % 4 + 1}") for index in range(8)
    )
    assert sorted(report.heads) == sorted(name for _, name in least[:2]) and report.heads_by == "gradients"
    by_weights = prune(place / "bert", out=tmp_path / "weights", options=PruneOptions(heads=0.25))
    assert by_weights.heads_by == "weights" and len(by_weights.heads) == 2
    assert tuple(weigh_heads(network(load_run(place / "bert"))).shape) == (2, 4)


def test_a_zeroed_head_says_nothing_and_can_be_taken_out(place: Path, tmp_path: Path) -> None:
    prune(place / "bert", out=tmp_path / "out", options=PruneOptions(heads=0.75))
    run = load_run(tmp_path / "out")
    before = run.logits(ROWS[:5])
    assert remove_zero_heads(network(run)) == 6
    torch.testing.assert_close(torch.from_numpy(run.logits(ROWS[:5])), torch.from_numpy(before), atol=1e-5, rtol=1e-5)
    parameters = dict(network(run).named_parameters())
    assert [len(parameters[f"bert.encoder.layer.{i}.attention.self.query.bias"]) for i in (0, 1)] == [8, 8]


def test_twice_is_added_up(place: Path, tmp_path: Path) -> None:
    prune(place / "bert", out=tmp_path / "one", options=PruneOptions(heads=0.25))
    report = prune(tmp_path / "one", out=tmp_path / "two", options=PruneOptions(heads=0.5, magnitude=0.5))
    record = load_run(tmp_path / "two").record.pruned
    assert len(report.heads) == 4 and record is not None and record.heads == report.heads
    with pytest.raises(StudentError, match="changes nothing"):
        prune(tmp_path / "two", out=tmp_path / "three", options=PruneOptions(heads=0.25))


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"magnitude": 1.0}, "prune the student to nothing: give a share below 1"),
        ({"heads": 1.5}, "prune the student to nothing: give a share below 1"),
        ({"magnitude": 0}, "prunes nothing: give a share above 0"),
        ({"heads": float("nan")}, "heads: Input should be a finite number"),
        ({}, "say what to prune"),
        ({"magnitud": 0.5}, "Did you mean 'magnitude'"),
    ],
)
def test_shares_that_cannot_be(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build_options(PruneOptions, given, where="prune")


def test_nothing_is_pruned_to_nothing(place: Path, tmp_path: Path) -> None:
    for name, asked, told in (
        ("bilstm", {"magnitude": 0.999}, "would leave nothing of 'fc.weight' .240 weights.: give a smaller share"),
        ("bilstm", {"magnitude": 0.5, "scope": "all"}, "give a smaller share, or scope 'matrix'"),
        ("bert", {"heads": 0.9}, "it can lose 1 to 6 .0.125 to 0.75., since each of its 2 layers keeps one"),
        ("bert", {"heads": 0.05}, "is 0: it can lose 1 to 6"),
        ("bilstm", {"heads": 0.5}, "has no attention heads that can be pruned: give a magnitude instead"),
    ):
        with pytest.raises(StudentError, match=told):
            prune(place / name, out=tmp_path / "out", options=PruneOptions.model_validate(asked))
    assert not (tmp_path / "out").exists()
    assert count_nonzero(network(load_run(place / "bert"))) > 0


def test_what_does_not_fit(place: Path, tmp_path: Path) -> None:
    linear = train(place, str(tmp_path / "linear"), student="linear", options={"min_df": 1}, losses={"mse_logits": 1})
    half = PruneOptions(magnitude=0.5)
    with pytest.raises(StudentError, match="only torch students are pruned"):
        prune(linear, out=tmp_path / "out", options=half)
    with pytest.raises(StudentError, match="give another folder"):
        prune(place / "bert", out=place / "bert", options=half)
    with pytest.raises(StudentError, match="is a bilstm student, not a transformer"):
        train(place, str(tmp_path / "no"), student="transformer", from_run=str(place / "bilstm"))
    with pytest.raises(ConfigError, match="leave out the options fc_size"):
        train(place, str(tmp_path / "no"), from_run=str(place / "bilstm"), options={"fc_size": 3})
    with pytest.raises(StudentError, match="give another folder"):
        train(place, "bilstm", from_run=str(place / "bilstm"))
    with pytest.raises(ConfigError, match="leave 'prune' out"):
        train(place, str(tmp_path / "no"), student="linear", losses={"ce": 1}, prune={"magnitude": 0.5})
    names = ["bad", "good"]
    rows = [Example(row.id, row.text, None, names[i % 2]) for i, row in enumerate(ROWS)]
    teacher = save_teacher(tmp_path / "teacher", label_names=names)
    dump(Corpus("made", None, rows, names), teacher=str(teacher), out=tmp_path / "cache", options=DumpOptions())
    with pytest.raises(StudentError, match="has the classes food, sport, weather, cache"):
        train(tmp_path, "no", from_run=str(place / "bilstm"))
    heads = PruneOptions(heads=0.5)
    with pytest.raises(StudentError, match="has the classes"):
        prune(place / "bert", out=tmp_path / "x", options=heads, cache=open_cache(tmp_path / "cache"))
    other = save_teacher(tmp_path / "other", texts=[text[::-1] for text, _ in TEXTS])
    dump(Corpus("made", None, ROWS, list(LABEL_NAMES)), teacher=str(other), out=tmp_path / "tokens")
    with pytest.raises(StudentError, match="reads other tokens than cache"):
        prune(place / "bert", out=tmp_path / "x", options=heads, cache=open_cache(tmp_path / "tokens"))
    assert not (tmp_path / "x").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for out, told in ((place / "bilstm", "holds a finished run"), (tmp_path / "mine", "not empty and no run")):
        with pytest.raises(ConfigError, match=told):
            prune(place / "bert", out=out, options=half)
    assert load_run(place / "bilstm").kind == "bilstm"
    draft = tmp_path / "killed" / f"{TEMPORARY}run"  # a kill came before run.json
    draft.mkdir(parents=True)
    (tmp_path / "killed" / "config.json").write_text("{}")
    prune(place / "bert", out=tmp_path / "killed", options=half)
    assert load_run(tmp_path / "killed").kind == "transformer" and not draft.exists()


def test_the_command_line(place: Path, tmp_path: Path, capsys: Any) -> None:
    def call(code: int, *arguments: object) -> tuple[str, str]:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        assert left.value.code == code
        return capsys.readouterr()

    said = call(0, "prune", place / "bilstm", "--magnitude", 0.5, "--out", tmp_path / "sparse", "--json")[0]
    assert json.loads(said)["zeros"] == pytest.approx(0.5, abs=0.05)
    fresh = ("--epochs", 1, "--batch-size", 16, "--cpu")
    call(0, "train-student", place / "cache", "--student", tmp_path / "sparse", "--out", tmp_path / "again", *fresh)
    assert load_run(tmp_path / "again").nonzero <= load_run(tmp_path / "sparse").nonzero
    asked = ("--student", "bilstm", "--prune", "magnitude=0.5", "--option", "fc_size=10")
    call(0, "train-student", place / "cache", *asked, "--out", tmp_path / "first", *fresh)
    assert load_run(tmp_path / "first").record.pruned is not None
    told = call(2, "prune", place / "bilstm", "--magnitude", 1, "--out", tmp_path / "none")[1]
    assert "would prune the student to nothing" in told and "Traceback" not in told
