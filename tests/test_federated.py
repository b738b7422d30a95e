"""Parties that tell each other logits on common rows, and nothing else."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from softlabels.cache import open_cache
from softlabels.cli import _guarded
from softlabels.corpus import Corpus, read_corpus
from softlabels.errors import ConfigError, CorpusError
from softlabels.federated import run_federation
from softlabels.parties import split_among_parties
from softlabels.recipes import FederatedRecipe, read_experiment, read_recipe
from softlabels.tables import federation_table
from softlabels.types import Example
from tests.models import TEXTS, save_model, tiny_classifier, tiny_tokenizer

TRANSFORMER: dict[str, Any] = {
    "student": "transformer",
    "options": {"layers": 1, "hidden_size": 8, "heads": 2, "intermediate_size": 16},
    "losses": {"kl": 1},
    "epochs": 1,
    "batch_size": 16,
}


LAYERED = [{"loss": "kl"}, {"loss": "hidden_mse", "map": "final", "project": "linear"}]

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with splits and a model to fine-tune."""
    folder = tmp_path_factory.mktemp("federated")
    (folder / "corpus").mkdir()
    splits = {
        "train": [(f"{text} zzprivate{number:03d}", label) for number, (text, label) in enumerate(TEXTS[:40])],
        "unlabeled": [(text, "") for text, _ in TEXTS[40:60]],
        "test": TEXTS[30:60],
    }
    for split, rows in splits.items():
        numbered = [(f"{split}-row-{number:03d}", *row) for number, row in enumerate(rows)]
        with (folder / "corpus" / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("id", "text", "label"), *numbered])
    tokenizer = tiny_tokenizer()
    save_model(folder / "base", tiny_classifier(tokenizer).bert, tokenizer)
    return folder


def recipe_of(place: Path, **changes: Any) -> FederatedRecipe:
    recipe: dict[str, Any] = {
        "name": "tiny",
        "corpus": {"source": str(place / "corpus"), "train": "train", "common": "unlabeled", "test": "test"},
        "parties": {"count": 2, "skew": 1.0},
        "teacher": {"model": str(place / "base"), "train": {"epochs": 1, "lr": 3e-3, "batch_size": 8}},
        "student": TRANSFORMER,
        "hard_epochs": 2,
    }
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    found = read_experiment(str(path))
    assert isinstance(found, FederatedRecipe)
    return found


def test_nothing_private_leaves_a_party(place: Path, tmp_path: Path) -> None:
    """No text, id or weight of a party lies outside its folder: all other files are searched for them."""
    revisit = {"epochs": 1, "lr": 1e-3, "batch_size": 8}
    recipe = recipe_of(place, rounds=2, revisit=revisit)
    said: list[str] = []
    result = run_federation(recipe, out=tmp_path / "run", say=said.append, cpu=True)
    out = tmp_path / "run"
    train = read_corpus(place / "corpus", split="train")
    known = (place / "base" / "model.safetensors").read_bytes()  # what all start from
    known = (place / "base" / "model.safetensors").read_bytes()  # what all start from
    secrets: dict[str, list[bytes]] = {}
    for row in result.rows:
        folder = out / "parties" / row.party
        lines = [json.loads(line) for line in (folder / "private.jsonl").read_text().splitlines()]
        assert len(lines) == row.rows == sum(row.classes.values())
        secrets[row.party] = [line["text"].encode() for line in lines]
        secrets[row.party] += [line["id"].encode() for line in lines]
        models = [path for path in folder.rglob("*.safetensors")]
        assert len(models) == 6  # teacher-1, student-1 and -2, revisited-1 and -2, alone
        for model in models:
            for tensor in load_file(model).values():
                values = tensor.float().numpy().tobytes()
                pieces = [values[start : start + 64] for start in range(0, len(values) - 63, 64)]
                learned = [piece for piece in pieces if piece not in known and len(set(piece)) > 16]
                secrets[row.party] += learned[:3]
        assert len(secrets[row.party]) > 2 * row.rows + 30
    texts = [secret for found in secrets.values() for secret in found if b"zzprivate" in secret]
    assert sorted(texts) == sorted(example.text.encode() for example in train.examples)  # disjoint, and all
    searched = 0
    for path in out.rglob("*"):
        if path.is_file():
            content, parts = path.read_bytes(), path.relative_to(out).parts
            searched += 1
            for party, found in secrets.items():
                if parts[:2] != ("parties", party):
                    told = [secret for secret in found if secret in content]
                    assert not told, f"{path} holds {told[:3]} of {party}"
            assert parts[0] == "parties" or path.suffix != ".safetensors"
    assert searched > 100

    first = open_cache(out / "shared" / "round-1" / "party-1")
    assert list(first.fields) == ["logits"] and not first.manifest.dump.text and first.rows == 20
    other = open_cache(out / "shared" / "round-1" / "party-2").column("logits")
    together = open_cache(out / "shared" / "round-1" / "consensus").column("logits")
    np.testing.assert_allclose(together, (first.column("logits") + other) / 2, rtol=1e-5, atol=1e-6)
    assert (first.labels == -100).all()  # the common rows have none
    assert [len(row.each_round) for row in result.rows] == [2, 2] and len(result.consensus_accuracy) == 2
    assert result.shared_bytes > 0 and result.common_rows == 20
    assert result.rows[0].gain == pytest.approx(result.rows[0].accuracy - result.rows[0].alone_accuracy)
    table = federation_table(result)
    assert "party-2" in table and "left the parties" in table

    said.clear()
    again = run_federation(recipe, out=out, say=said.append, cpu=True)
    assert said == [] and again.rows == result.rows and again.skipped > 20
    longer = recipe_of(place, rounds=2, revisit=revisit, student=TRANSFORMER | {"epochs": 2})
    run_federation(longer, out=out, say=said.append, cpu=True)
    assert "party-1-teacher-1 …" not in said and "party-1-student-1 …" in said


def test_the_parts_are_disjoint_and_as_uneven_as_asked() -> None:
    rows = [Example(str(n), f"text {n}", label=["a", "b", "c"][n % 3]) for n in range(600)]
    corpus = Corpus("made", None, [*rows, Example("bare", "no label")], ["a", "b", "c"])

    def unevenness(skew: float) -> float:
        spread = []
        for seed in range(10):
            parts = split_among_parties(corpus, 4, skew=skew, seed=seed)
            ids = [row.id for part in parts for row in part.examples]
            assert sorted(ids) == sorted(row.id for row in rows)  # every labelled row once
            for part in parts:
                counts = np.array([sum(row.label == name for row in part.examples) for name in "abc"])
                spread.append((counts / counts.sum()).max())
        return float(np.mean(spread))

    assert unevenness(100.0) < 0.45 < unevenness(1.0) < unevenness(0.3)
    one, same, other = (split_among_parties(corpus, 3, skew=1.0, seed=seed) for seed in (0, 0, 1))
    assert one == same != other
    few = split_among_parties(corpus, 2, skew=10.0, seed=0, rows=50)
    assert [len(part.examples) for part in few] == [50, 50]
    small = Corpus("small", None, rows[:6], ["a", "b", "c"])
    with pytest.raises(CorpusError, match="can't be split among 5 parties"):
        split_among_parties(small, 5, skew=0.1, seed=0)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"teacher": {"model": "somewhere"}}, "say how with teacher.train"),
        ({"dump": {"capture": ["logits", "hidden:1"]}}, "logits alone"),
        ({"combine": {"weights": [1, 2, 3]}}, "3 numbers for 2 parties"),
        ({"combine": {"choose": "label"}}, "no labels"),
        ({"combine": {"keep": True}}, "handed on"),
        ({"student": TRANSFORMER | {"losses": {"kl": 1, "ce": 1}}}, "leave loss 'ce' out"),
        ({"student": TRANSFORMER | {"options": {"init_from": "teacher"}}}, "no model that all parties have"),
        ({"student": {"student": "bilstm", "losses": {"kl": 1}}, "revisit": {"epochs": 1}}, "must be a transformer"),
        ({"student": {"student": "linear", "losses": {"mse_logits": 1}}}, "which a linear student reads"),
        ({"student": TRANSFORMER | {"losses": LAYERED}}, "loss 'hidden_mse' looks at layers"),
        ({"rounds": 2}, "say how with 'revisit'"),
        ({"parties": {"count": 1}}, "greater than or equal to 2"),
        ({"corpus": {"source": "a.csv", "test": "test"}}, "common"),
        ({"corpus": {"source": "a.csv", "common": "unlabeled"}}, "say what to test on"),
    ],
)
def test_what_no_federation_may_ask(place: Path, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        recipe_of(place, **changes)


def test_a_common_corpus_of_private_rows_is_refused(place: Path, tmp_path: Path) -> None:
    corpus = {"source": str(place / "corpus"), "train": "train", "common": "train", "test": "test"}
    with pytest.raises(CorpusError, match=r"every row of the common corpus .* which parties keep to themselves"):
        run_federation(recipe_of(place, corpus=corpus), out=tmp_path / "run", cpu=True)
    corpus |= {"common": "unlabeled", "test": "train"}
    with pytest.raises(CorpusError, match=r"every row of the test corpus .* give other rows as corpus\.test"):
        run_federation(recipe_of(place, corpus=corpus), out=tmp_path / "run", cpu=True)
    assert not (tmp_path / "run").exists()


def test_rounds_go_on_and_private_rows_are_no_test(place: Path, tmp_path: Path) -> None:
    """A student whose rate is next to nothing is in the second round what it was after the first."""
    private = read_corpus(place / "corpus", split="train").examples[:7]
    with (tmp_path / "test.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [(row.text, row.label) for row in private] + TEXTS[30:50]
        csv.writer(file).writerows([("text", "label"), *rows])
    corpus = {"source": str(place / "corpus"), "train": "train", "common": "unlabeled"}
    said: list[str] = []
    recipe = recipe_of(
        place,
        corpus=corpus | {"test_source": str(tmp_path / "test.csv")},
        student=TRANSFORMER | {"lr": 1e-12},
        rounds=2,
        revisit={"epochs": 2, "lr": 1e-2, "batch_size": 8},
    )
    run_federation(recipe, out=tmp_path / "run", say=said.append, cpu=True)
    assert "7 of 27 test rows are also among the parties': they are left out" in said
    assert open_cache(tmp_path / "run" / "tests" / "round-1" / "party-1").rows == 20
    for party in ("party-1", "party-2"):
        before, after = (
            load_file(tmp_path / "run" / "parties" / party / name / "model.safetensors")
            for name in ("revisited-1", "student-2")
        )
        first = load_file(tmp_path / "run" / "parties" / party / "student-1" / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(np.allclose(before[key], after[key], atol=1e-6) for key in before)
        assert not all(np.allclose(first[key], before[key], atol=1e-4) for key in before)


def test_the_shipped_recipe_is_one_and_other_commands_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(read_experiment("federated"), FederatedRecipe)
    with pytest.raises(ConfigError, match="federation of parties: softlabels run takes it"):
        read_recipe("federated")
    assert _guarded(["run", "federated", "--set", "parties.count=1"], debug=False) == 2
    assert "parties.count" in capsys.readouterr().err
