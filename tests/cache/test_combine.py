"""`combine`: what several teachers say together, held to loops over rows; joins, refusals, kills."""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch

from softlabels.cache import combine as module
from softlabels.cache import open_cache
from softlabels.cache.combine import combine, counted, join_of
from softlabels.cache.combined import open_combined
from softlabels.cache.format import MANIFEST, read_manifest, to_json
from softlabels.cache.grouped import ShardGroup
from softlabels.cache.info import describe
from softlabels.cache.mixing import plan_mixing
from softlabels.cache.verify import verify_cache
from softlabels.cli import _guarded
from softlabels.config import CombineOptions, DumpOptions, ImportOptions, StudentOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.errors import CacheError, ConfigError
from softlabels.evaluate import evaluate
from softlabels.imports import import_logits
from softlabels.train import train_student
from softlabels.types import NO_LABEL, Example
from tests.cache.made import rows_of, write_cache
from tests.models import LABEL_NAMES, TEXTS, save_teacher, tiny_tokenizer

ROWS, SHARD_ROWS = 40, 16
EXAMPLES = [Example(f"r{i}", text, label=name if i % 5 else None) for i, (text, name) in enumerate(TEXTS[:ROWS])]


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two that part the same texts otherwise."""
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny_tokenizer().save_pretrained(folder / "one")
    tiny_tokenizer([text[::-1] for text, _ in TEXTS]).save_pretrained(folder / "two")
    return [str(folder / "one"), str(folder / "two")]


def make(
    out: Path,
    tokenizer: str,
    *,
    seed: int,
    examples: Sequence[Example] = EXAMPLES,
    names: Sequence[str] = LABEL_NAMES,
    **options: Any,
) -> Path:
    """A cache of random logits, those of a row of a seed always the same, whatever rows are beside it."""
    values = []
    for example in examples:
        number = int(hashlib.sha256(f"{seed} {example.id}".encode()).hexdigest()[:8], 16)
        by_name = dict(zip(LABEL_NAMES, np.random.default_rng(number).normal(size=3) * 3, strict=True))
        values.append([by_name.get(name, 0.0) for name in names])
    corpus = Corpus("texts.csv", None, list(examples), list(LABEL_NAMES))
    chosen: dict[str, Any] = {
        "label_names": list(names),
        "teacher_name": f"teacher {seed}",
        "shard_rows": SHARD_ROWS,
    } | options
    import_logits(corpus, values, tokenizer=tokenizer, out=out, options=ImportOptions(**chosen))
    return out


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, tokenizers: list[str]) -> list[Path]:
    """Three teachers of the same rows."""
    folder = tmp_path_factory.mktemp("three")
    return [make(folder / f"cache-{seed}", tokenizers[0], seed=seed) for seed in range(3)]


# ------------------------------------------------------------------------------------------------ by hand, in float64


def softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    parts = [math.exp(value - top) for value in logits]
    return [part / sum(parts) for part in parts]


def by_hand(said: list[list[float]], label: int, options: CombineOptions) -> list[float]:
    """The logits of one row, from those of each teacher."""
    probabilities = [softmax(logits) for logits in said]
    if options.choose == "entropy":
        entropies = [-sum(p * math.log(p) for p in row) for row in probabilities]
        return said[entropies.index(min(entropies))]
    if options.choose == "label" and label != NO_LABEL:
        on_label = [row[label] for row in probabilities]
        return said[on_label.index(max(on_label))]
    weights = options.weights or [1.0] * len(said)
    shares = [weight / sum(weights) for weight in weights]
    classes = range(len(said[0]))
    if options.mean == "median":
        return [median(logits[c] for logits in said) for c in classes]
    if options.mean == "logits":
        return [sum(w * logits[c] for w, logits in zip(shares, said, strict=True)) for c in classes]
    return [math.log(sum(w * row[c] for w, row in zip(shares, probabilities, strict=True))) for c in classes]


RULES = [
    {"mean": "logits"},
    {"mean": "probabilities"},
    {"mean": "median"},
    {"mean": "logits", "weights": [2, 1, 5]},
    {"mean": "probabilities", "weights": [0.1, 0.2, 0.3]},
    {"choose": "label"},
    {"choose": "label", "mean": "probabilities", "weights": [3, 1, 1]},
    {"choose": "entropy"},
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(f"{key}={value}" for key, value in rule.items()))
def test_every_rule_is_its_formula(three: list[Path], tmp_path: Path, rule: dict[str, Any]) -> None:
    options = CombineOptions(**rule, keep=True)
    report = combine(three, out=tmp_path / "out", options=options)
    cache = open_cache(tmp_path / "out")
    said = [open_cache(path).column("logits").astype(float).tolist() for path in three]
    wanted = [by_hand([part[row] for part in said], int(cache.labels[row]), options) for row in range(ROWS)]
    assert np.abs(cache.column("logits") - wanted).max() < 2e-6
    assert (cache.labels == NO_LABEL).any() and report.rows == report.new_rows == ROWS
    for number in range(3):
        assert cache.column(f"logits.{number + 1:02d}").tolist() == open_cache(three[number]).column("logits").tolist()
    assert verify_cache(tmp_path / "out").faults == [] and verify_cache(tmp_path / "out").notes == []
    # mixed as it is read: the same rows, whatever batch they are in
    view = open_combined(three, options)
    order = np.random.default_rng(0).permutation(ROWS)
    assert torch.equal(view.signals(order, ["logits"]).logits, cache.signals(order, ["logits"]).logits)
    assert np.array_equal(view.column("logits"), cache.column("logits"))


def test_what_no_teacher_holds_possible_has_a_logit_all_the_same() -> None:
    """Probabilities of e^-900 are 0 in float64; their logarithms are not."""
    mixing = plan_mixing(CombineOptions(mean="probabilities"), "sequence-classification", [["a", "b", "c"]] * 2)
    one, other = (
        torch.tensor([[0.0, -900.0, -2000.0], [3.0, 1.0, 2.0]]),
        torch.tensor([[0.0, -1000.0, -5.0], [1.0] * 3]),
    )
    mixed = mixing.mix([one, other], torch.tensor([NO_LABEL, NO_LABEL]))
    half, sure = math.log(0.5), math.log1p(math.exp(-5))  # log of the second teacher's sum
    wanted = [math.log(0.5 + 0.5 * math.exp(-sure)), -900 + half, -5 - sure + half]
    assert mixed[0].tolist() == pytest.approx(wanted, rel=1e-6)
    alone = mixing.mix([one[1:], other[1:]], torch.tensor([NO_LABEL]))
    assert torch.equal(mixed[1:], alone)  # whatever row is beside it


def test_what_is_said_of_it(three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(path) for path in three]
    command = ["combine", *names, "--out", str(tmp_path / "out"), "--mean", "probabilities", "--weights", "2,1,1"]
    assert _guarded([*command, "--keep", "--json"], debug=True) == 0
    said = json.loads(capsys.readouterr().out)
    assert [share["weight"] for share in said["caches"]] == [0.5, 0.25, 0.25]
    assert said["fields"] == ["logits", "logits.01", "logits.02", "logits.03"]
    manifest = read_manifest(tmp_path / "out")
    card = manifest.combined
    assert card is not None and (card.how, card.choose) == ("probabilities", None)
    assert [part.identity for part in card.caches] == [open_cache(path).identity() for path in three]
    assert [part.weights_hash for part in card.caches] == [read_manifest(p).teacher.weights_hash for p in three]
    assert manifest.teacher.weights_hash.startswith("combined-")
    assert manifest.corpus == read_manifest(three[0]).corpus
    facts = describe(manifest)["combined"]
    assert facts["weights"] == [0.5, 0.25, 0.25] and facts["teachers"] == ["teacher 0", "teacher 1", "teacher 2"]
    for command, words in (
        (["info", str(tmp_path / "out")], ["teacher 0 + teacher 1 + teacher 2", "probabilities", "0.25"]),
        (["combine", *names, "--out", str(tmp_path / "more")], ["id and token hash", "0.333", "teacher 2"]),
    ):
        assert _guarded(command, debug=True) == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words)


def test_a_cache_of_caches_is_combined_again(three: list[Path], tmp_path: Path) -> None:
    combine(three[:2], out=tmp_path / "two")
    combine([tmp_path / "two", three[2]], out=tmp_path / "out", options=CombineOptions(weights=[2, 1]))
    combine(three, out=tmp_path / "at-once")
    once, twice = (open_cache(tmp_path / name).column("logits") for name in ("at-once", "out"))
    assert np.abs(once - twice).max() < 1e-6 and verify_cache(tmp_path / "out").faults == []


# ------------------------------------------------------------------------------------------------------------ joins


def test_classes_are_joined_by_name(three: list[Path], tokenizers: list[str], tmp_path: Path) -> None:
    turned = [LABEL_NAMES[2], LABEL_NAMES[0], LABEL_NAMES[1]]
    other = make(tmp_path / "other", tokenizers[0], seed=1, names=turned)
    assert open_cache(other).label_names == turned
    for options in (CombineOptions(keep=True), CombineOptions(choose="label")):
        for name, second in (("plain", three[1]), ("turned", other)):
            combine([three[0], second, three[2]], out=tmp_path / f"{name}{options.choose}", options=options)
        plain, aligned = (open_cache(tmp_path / f"{name}{options.choose}") for name in ("plain", "turned"))
        assert np.array_equal(plain.column("logits"), aligned.column("logits"))
        view = open_combined([three[0], other, three[2]], options)
        assert np.array_equal(view.column("logits"), plain.column("logits"))
    kept = open_cache(tmp_path / "turnedNone").column("logits.02")
    assert np.array_equal(kept, open_cache(three[1]).column("logits"))


def test_rows_in_another_order_and_other_shards(three: list[Path], tokenizers: list[str], tmp_path: Path) -> None:
    shuffled = [EXAMPLES[i] for i in np.random.default_rng(1).permutation(ROWS)]
    other = make(tmp_path / "other", tokenizers[0], seed=1, examples=shuffled, shard_rows=7)
    report = combine([three[0], other], out=tmp_path / "out")
    combine(three[:2], out=tmp_path / "plain")
    for field in ("examples", "logits"):  # the same files, but for what the manifest says of where they are from
        names = sorted(path.name for path in (tmp_path / "plain" / field).iterdir())
        assert names == sorted(path.name for path in (tmp_path / "out" / field).iterdir()) and len(names) == 6
        for name in names:
            assert (tmp_path / "out" / field / name).read_bytes() == (tmp_path / "plain" / field / name).read_bytes()
    assert [(share.shared, share.lacks) for share in report.caches] == [(ROWS, 0), (ROWS, 0)]


def test_partial_overlap_is_reported(three: list[Path], tokenizers: list[str], tmp_path: Path, capsys) -> None:
    own = [Example(f"own{i}", f"a text of its own {i}", label=LABEL_NAMES[i % 3]) for i in range(3)]
    second = make(tmp_path / "b", tokenizers[0], seed=1, examples=[*own, *EXAMPLES[10:], *EXAMPLES[:3]])
    third = make(tmp_path / "c", tokenizers[0], seed=2, examples=[e for e in EXAMPLES if e.id != "r12"], shard_rows=9)
    report = combine([three[0], second, third], out=tmp_path / "out", options=CombineOptions(keep=True))
    wanted = [i for i in range(ROWS) if (i >= 10 or i < 3) and i != 12]
    cache, first = open_cache(tmp_path / "out"), open_cache(three[0])
    assert cache.ids == [f"r{i}" for i in wanted] and cache.texts() == [first.texts()[i] for i in wanted]
    assert np.array_equal(cache.labels, first.labels[wanted])
    assert np.array_equal(cache.token_hashes, first.token_hashes[wanted])
    shares = [(share.rows, share.shared, share.lacks, share.left_out) for share in report.caches]
    assert shares == [(40, 40, 0, 8), (36, 33, 7, 4), (39, 39, 1, 7)] and report.rows == len(wanted) == 32
    mean = np.mean([open_cache(path).column("logits")[wanted] for path in three], axis=0)
    assert np.abs(cache.column("logits") - mean).max() < 1e-6
    assert np.array_equal(cache.column("logits.03"), open_cache(three[2]).column("logits")[wanted])
    verdict = verify_cache(tmp_path / "out")
    assert verdict.faults == [] and cache.manifest.corpus.labelled == sum(i % 5 > 0 for i in wanted)
    view = open_combined([three[0], second, third])
    assert (view.rows, view.ids, view.texts()) == (cache.rows, cache.ids, cache.texts())
    assert np.array_equal(view.lengths, cache.lengths) and view.manifest.corpus.labelled == 24 + 1
    assert torch.equal(view.tokens([31, 0]).input_ids, cache.tokens([31, 0]).input_ids)
    assert np.array_equal(view.used_ids(np.arange(4)), cache.used_ids(np.arange(4)))
    with pytest.raises(IndexError):
        view.tokens([32])
    assert view.overlap() == [
        f"{three[0]}: 32 of its 40 rows are in all caches; the others are left out",
        f"{second}: 33 of its 36 rows are in {three[0]}, which has 7 more; 4 are left out",
        f"{third}: 39 of its 39 rows are in {three[0]}, which has 1 more; 7 are left out",
    ]
    assert open_combined(three).overlap() == []
    command = ["train-student", str(three[0]), str(second), "--student", "bilstm", "--epochs", "1"]
    assert _guarded([*command, "--out", str(tmp_path / "run")], debug=True) == 0
    assert f"{second}: 33 of its 36 rows are in" in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [(share["shared"], share["lacks"]) for share in record["cache"]["combined"]] == [(40, 0), (33, 7)]


def test_other_tokenizers_are_joined_by_text(three: list[Path], tokenizers: list[str], tmp_path: Path) -> None:
    changed = [replace(EXAMPLES[0], text="another text under the same id"), *EXAMPLES[1:]]
    other = make(tmp_path / "other", tokenizers[1], seed=1, examples=changed)
    assert not set(open_cache(other).token_hashes.tolist()) & set(open_cache(three[0]).token_hashes.tolist())
    report = combine([three[0], other], out=tmp_path / "out")
    assert report.caches[1].joined_by == "id and text" and report.rows == ROWS - 1
    cache = open_cache(tmp_path / "out")
    mean = np.mean([open_cache(path).column("logits")[1:] for path in three[:2]], axis=0)
    assert np.abs(cache.column("logits") - mean).max() < 1e-6 and cache.ids[0] == "r1"
    assert cache.manifest.tokenizer_hash == open_cache(three[0]).manifest.tokenizer_hash
    assert verify_cache(tmp_path / "out").faults == []
    # without texts: only where both say that their corpus was the same
    bare = make(tmp_path / "bare", tokenizers[1], seed=1, text=False)
    report = combine([three[0], bare], out=tmp_path / "by-id")
    assert report.caches[1].joined_by == "id alone, of one corpus" and report.rows == ROWS
    bare = make(tmp_path / "bare-other", tokenizers[1], seed=1, examples=changed, text=False)
    with pytest.raises(CacheError, match=r"cannot be told to be the same.*bare-other holds no texts.*Dump them with"):
        combine([three[0], bare], out=tmp_path / "refused")


def test_one_vocabulary_with_and_without_token_types(three: list[Path], tokenizers: list[str], tmp_path: Path) -> None:
    """BERT's tokenizer and DistilBERT's: no token hash agrees, the texts do."""
    plain = tiny_tokenizer()
    plain.model_input_names = ["input_ids", "attention_mask"]
    plain.save_pretrained(tmp_path / "plain")
    other = make(tmp_path / "other", str(tmp_path / "plain"), seed=1)
    assert open_cache(other).manifest.tokenizer_hash == open_cache(three[0]).manifest.tokenizer_hash
    assert not open_cache(other).manifest.teacher.token_types
    report = combine([three[0], other], out=tmp_path / "both")
    assert report.rows == ROWS and report.caches[1].joined_by == "id and text"
    combine([three[0], three[1]], out=tmp_path / "same")  # with the same logits, of the same seed
    assert np.array_equal(
        open_cache(tmp_path / "both").column("logits"), open_cache(tmp_path / "same").column("logits")
    )


def test_cut_rows_are_counted(tokenizers: list[str], tmp_path: Path) -> None:
    first = make(tmp_path / "a", tokenizers[0], seed=0, max_length=14)
    other = make(tmp_path / "b", tokenizers[0], seed=1, max_length=14, examples=EXAMPLES[:20])
    cut = read_manifest(first).corpus.truncated
    assert 0 < cut < ROWS
    combine([first, make(tmp_path / "c", tokenizers[0], seed=2, max_length=14)], out=tmp_path / "all")
    assert read_manifest(tmp_path / "all").corpus.truncated == cut
    combine([first, other], out=tmp_path / "some")
    assert 0 < read_manifest(tmp_path / "some").corpus.truncated <= cut
    (first / "examples" / "00001.json").unlink()  # a copy may lack receipts
    assert counted(open_cache(first), "examples") == [cut, 0, 0]
    combine([first, make(tmp_path / "d", tokenizers[0], seed=3, max_length=14)], out=tmp_path / "lost")
    assert read_manifest(tmp_path / "lost").corpus.truncated == cut
    assert all(verify_cache(tmp_path / name).faults == [] for name in ("all", "some", "lost"))


def test_join_of_a_table_is_the_formats(three: list[Path]) -> None:
    cache = open_cache(three[0])
    table = cache.table("examples", 1)
    assert join_of([table]) == join_of([table.slice(0, 5), table.slice(5)]) == cache.manifest.join[32:64]


# -------------------------------------------------------------------------------------------------------- refusals


def test_a_party_without_overlap_is_named(three: list[Path], tokenizers: list[str], tmp_path: Path) -> None:
    own = [Example(f"own{i}", f"a text of its own {i}") for i in range(4)]
    lonely = make(tmp_path / "lonely", tokenizers[0], seed=4, examples=own)
    with pytest.raises(CacheError, match=r"lonely shares no row with .*cache-0: no id.*texts.csv.*leave this"):
        combine([*three, lonely], out=tmp_path / "out")
    twins = [Example(e.id, f"{e.text} but otherwise") for e in EXAMPLES]
    lonely = make(tmp_path / "twins", tokenizers[0], seed=4, examples=twins)
    with pytest.raises(CacheError, match=r"twins shares no row with .*: 40 ids, but with other tokens in every one"):
        open_combined([three[0], lonely])
    halves = [
        make(tmp_path / n, tokenizers[0], seed=5, examples=e) for n, e in (("h1", EXAMPLES[:9]), ("h2", EXAMPLES[9:]))
    ]
    with pytest.raises(CacheError, match=r"no row is in all of the 3 caches.*share 9, 31"):
        combine([three[0], *halves], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_classes_and_tasks(three: list[Path], tokenizers: list[str], tmp_path: Path) -> None:
    other = make(tmp_path / "other", tokenizers[0], seed=1, names=[*LABEL_NAMES[:2], "weather", "hockey"])
    with pytest.raises(CacheError, match=r"have other classes \(.*cache-0 lacks 'hockey'\).*joined by their names"):
        combine([three[0], other], out=tmp_path / "out")
    for task, told in (("regression", "for sequence-classification and .* for regression"), ("masked-lm", "no logits")):
        stranger = Path(shutil.copytree(three[1], tmp_path / task))
        manifest = read_manifest(stranger)
        card = manifest.teacher.model_copy(update={"task": task, "label_names": [] if task == "masked-lm" else ["x"]})
        fields = {"logits": manifest.fields["logits"].model_copy(update={"width": 1})}
        changed = manifest.model_copy(update={"teacher": card, "fields": fields})
        (stranger / MANIFEST).write_bytes(to_json(changed))
        with pytest.raises(CacheError, match=told):
            combine([three[0], stranger], out=tmp_path / "out")
    with pytest.raises(CacheError, match="unfinished"):
        manifest = read_manifest(three[1]).model_copy(
            update={"complete": False, "shard_rows": [], "shard_tokens": [], "join": "", "shards": {}}
        )
        (stranger / MANIFEST).write_bytes(to_json(manifest))
        combine([three[0], stranger], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--weights", "1,2"], "2 weights (1, 2) for 3 caches: give one for each cache"),
        (["--weights", "1,2,x"], "give numbers separated by commas"),
        (["--weights", "1,2,0"], "greater than 0"),
        (["--weights", "1,2,nan"], "finite"),
        (["--mean", "mode"], "'logits', 'probabilities' or 'median'"),
        (["--mean", "median", "--weights", "1,1,1"], "a median has no weights"),
        (["--choose", "entropy", "--weights", "1,1,1"], "weights have no say in it"),
        (["--rows", "--mean", "median"], "--rows mixes nothing, so it takes no --mean"),
    ],
)
def test_wrong_options(three: list[Path], tmp_path: Path, capsys, more: list[str], told: str) -> None:
    names = [str(path) for path in three]
    assert _guarded(["combine", *names, "--out", str(tmp_path / "out"), *more], debug=False) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()
    if "--rows" not in more:
        train = ["train-student", *names, "--out", str(tmp_path / "run"), "--student", "linear", *more]
        assert _guarded(train, debug=False) == 2
        assert told in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_wrong_caches(three: list[Path], tmp_path: Path, capsys) -> None:
    out = ["--out", str(tmp_path / "out")]
    for command, told in (
        (["combine", str(three[0]), *out], "takes two caches or more"),
        (["combine", str(three[0]), str(three[0]), *out], "is named twice: to have it count for more, give --weights"),
        (["combine", str(three[0]), str(tmp_path / "nowhere"), *out], "no cache at"),
        (["combine", str(three[0]), str(three[1]), "--out", str(three[2])], "another configuration"),
        (["train-student", str(three[0]), "--student", "linear", "--mean", "median", *out], "--mean combines several"),
    ):
        assert _guarded(command, debug=False) == 2
        said = capsys.readouterr().err
        assert told in said and "Traceback" not in said


def test_damaged_inputs_are_not_mixed(three: list[Path], tokenizers: list[str], tmp_path: Path) -> None:
    other = Path(shutil.copytree(three[1], tmp_path / "other"))
    file = other / "logits" / "00001.arrow"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CacheError, match=r"other/logits/00001.arrow is not the file that was written"):
        combine([three[0], other], out=tmp_path / "out")
    some = make(tmp_path / "some", tokenizers[0], seed=0, examples=EXAMPLES[3:])
    with pytest.raises(CacheError, match=r"other/logits/00001.arrow is not the file that was written"):
        combine([some, other], out=tmp_path / "out-2")


# ---------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(("together", "many"), [(1, 32), (2, 32), (2, 1)], ids=["alone", "together", "processes"])
@pytest.mark.parametrize("overlap", ["all", "some"])
def test_a_killed_combination_goes_on_to_the_same_bytes(
    three: list[Path],
    tokenizers: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overlap: str,
    together: int,
    many: int,
) -> None:
    caches = list(three)
    if overlap == "some":
        caches[1] = make(tmp_path / "some", tokenizers[0], seed=1, examples=EXAMPLES[2:])
    options = CombineOptions(mean="probabilities", keep=True)
    combine(caches, out=tmp_path / "whole", options=options)
    monkeypatch.setattr(module, "_FILES", together * 5)
    monkeypatch.setattr(module, "_MANY", many)
    monkeypatch.setattr(module, "processes_for", lambda _: 2)
    real = module._Writer.write

    def killed(self, shard: int, missing: Sequence[str], group: ShardGroup) -> None:
        if shard == 2:
            raise KeyboardInterrupt
        real(self, shard, missing, group)

    with monkeypatch.context() as patch:
        patch.setattr(module._Writer, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            combine(caches, out=tmp_path / "broken", options=options)
    assert not read_manifest(tmp_path / "broken").complete
    (tmp_path / "broken" / "logits" / "00000.json").unlink()  # as if killed between file and receipt
    report = combine(caches, out=tmp_path / "broken", options=options)
    assert report.new_rows == report.rows - SHARD_ROWS  # of the second shard alone everything was there
    contents = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "whole", tmp_path / "broken")
    ]
    assert contents[0] == contents[1]
    assert combine(caches, out=tmp_path / "broken", options=options).new_rows == 0
    with pytest.raises(CacheError, match=r"another configuration.*combined"):
        combine(caches, out=tmp_path / "broken", options=CombineOptions())


def test_killed_between_names_and_receipts(three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).parent.name == "logits" and Path(target).suffix == ".json":
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            combine(three, out=tmp_path / "broken")
    assert list((tmp_path / "broken" / "logits").glob("*.arrow"))
    assert not list((tmp_path / "broken" / "logits").glob("*.json"))
    combine(three, out=tmp_path / "broken")
    combine(three, out=tmp_path / "whole")
    assert read_manifest(tmp_path / "broken") == read_manifest(tmp_path / "whole")
    assert verify_cache(tmp_path / "broken").faults == []


def test_what_is_open_at_once_is_bounded(three: list[Path], tokenizers: list[str], tmp_path: Path) -> None:
    caches = [make(tmp_path / f"cache-{seed}", tokenizers[0], seed=seed, shard_rows=1) for seed in range(6)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 2 * module._FILES + 20, hard))
    try:
        assert combine(caches, out=tmp_path / "out", options=CombineOptions(keep=True)).rows == ROWS
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_shards_of_many_bytes_are_laid_out_on_the_disk(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = CombineOptions(choose="label", keep=True)
    combine(three, out=tmp_path / "small", options=options)
    monkeypatch.setattr(module, "SMALL", 1)
    monkeypatch.setattr("softlabels.cache.shards.SMALL", 1)
    combine(three, out=tmp_path / "large", options=options)
    assert read_manifest(tmp_path / "small") == read_manifest(tmp_path / "large")


def test_a_shard_without_tokens(tmp_path: Path) -> None:
    """Logits for every token, and the last text is empty."""
    rows, fields = rows_of([3, 2, 0]), {"logits": {"kind": "token", "type": "float32", "width": 2}}
    for seed in range(2):
        said = [np.random.default_rng([seed, i]).normal(size=(len(row.input_ids), 2)) for i, row in enumerate(rows)]
        values = {"logits": [part.astype(np.float32) for part in said]}
        write_cache(tmp_path / str(seed), rows, fields, values, shard_rows=2)
    combine([tmp_path / "0", tmp_path / "1"], out=tmp_path / "out")
    assert open_cache(tmp_path / "out").batch([0, 1, 2], ["logits"]).teacher.logits.shape == (3, 3, 2)


def test_examples_that_are_not_the_manifests_are_refused(three: list[Path], tmp_path: Path) -> None:
    """Their hashes are right: whoever wrote them wrote them so."""
    rows, fields = rows_of([3] * 5), {"logits": {"kind": "row", "type": "float32", "width": 2}}
    rows[3].input_ids[1] = 100  # of a vocabulary of 100
    for seed in range(2):
        values = {"logits": [np.full(2, seed + i, np.float32) for i in range(5)]}
        write_cache(tmp_path / str(seed), rows, fields, values, shard_rows=2)
    with pytest.raises(CacheError, match="token ids beyond the vocabulary of 100"):
        combine([tmp_path / "0", tmp_path / "1"], out=tmp_path / "out")


def test_kept_logits_can_be_added_later(three: list[Path], tmp_path: Path) -> None:
    combine(three, out=tmp_path / "out")
    before = (tmp_path / "out" / "logits" / "00000.arrow").read_bytes()
    assert set(combine(three, out=tmp_path / "out", options=CombineOptions(keep=True)).fields) > {"logits"}
    assert (tmp_path / "out" / "logits" / "00000.arrow").read_bytes() == before
    assert verify_cache(tmp_path / "out").faults == []


# ------------------------------------------------------------------------------------------------------- real teachers


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Caches of two tiny teachers with hidden states."""
    folder = tmp_path_factory.mktemp("dumped")
    corpus = Corpus("texts.csv", None, EXAMPLES, list(LABEL_NAMES))
    for seed in (0, 1):
        teacher = str(save_teacher(folder / f"teacher-{seed}", seed=seed))
        options = DumpOptions(capture=["logits", "hidden:1"], shard_rows=SHARD_ROWS)
        dump(corpus, teacher=teacher, out=folder / f"cache-{seed}", options=options, device="cpu")
    return [folder / "cache-0", folder / "cache-1"]


BILSTM = StudentOptions(
    student="bilstm",
    options={"embedding_dim": 8, "hidden_size": 8, "fc_size": 8},
    losses={"kl": 1, "ce": 0.5},
    temperature="2",
    epochs=2,
    batch_size=8,
)


@pytest.mark.parametrize("choose", [None, "label"])
def test_training_on_the_fly_is_training_from_the_combined_cache(
    dumped: list[Path], tokenizers: list[str], tmp_path: Path, choose
) -> None:
    third = make(tmp_path / "third", tokenizers[1], seed=3, examples=EXAMPLES[4:])  # other tokens, fewer rows
    options = CombineOptions(mean="probabilities", choose=choose)
    combine([*dumped, third], out=tmp_path / "cache", options=options)
    view, cache = open_combined([*dumped, third], options), open_cache(tmp_path / "cache")
    assert view.rows == cache.rows == ROWS - 4 and view.manifest.teacher == cache.manifest.teacher
    train_student(view, out=tmp_path / "a", options=BILSTM, cpu=True)
    train_student(cache, out=tmp_path / "b", options=BILSTM, cpu=True)
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in "ab"]
    for one, two in zip(*(record["history"] for record in records), strict=True):
        assert one["train/loss"] == pytest.approx(two["train/loss"], rel=1e-5)
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    scores = [evaluate(tmp_path / name, Corpus("t", None, EXAMPLES, list(LABEL_NAMES)), cache=cache) for name in "ab"]
    assert scores[0].fidelity is not None and scores[0].fidelity.rows == cache.rows
    assert scores[0].accuracy == scores[1].accuracy
    with pytest.raises(CacheError, match="combine"):
        view.table("logits", 0)


def test_layers_are_the_first_caches(dumped: list[Path], tmp_path: Path) -> None:
    view = open_combined(dumped)
    batch = view.batch([7, 3], ["hidden.01", "logits"])
    first = open_cache(dumped[0]).batch([7, 3], ["hidden.01"])
    assert torch.equal(batch.teacher.hidden(1), first.teacher.hidden(1))
    assert list(batch.teacher.fields) == ["hidden.01", "logits"] and batch.rows.tolist() == [7, 3]
    combine(dumped, out=tmp_path / "out")
    assert set(open_cache(tmp_path / "out").fields) == {"logits"}
    losses = [{"loss": "hidden_mse", "map": "final"}]
    patient = StudentOptions.model_validate({"student": "transformer", "options": {"layers": 1}, "losses": losses})
    with pytest.raises(CacheError, match=r"needs hidden.*several teachers' caches \(.*train from that teacher's cache"):
        train_student(open_cache(tmp_path / "out"), out=tmp_path / "run", options=patient, cpu=True)


def test_train_student_takes_several_caches(dumped: list[Path], tmp_path: Path, capsys) -> None:
    command = ["train-student", *map(str, dumped), "--mean", "probabilities", "--weights", "3,1", "--student", "linear"]
    assert _guarded([*command, "--out", str(tmp_path / "run"), "--json"], debug=True) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 36
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    view = open_combined(dumped, CombineOptions(mean="probabilities", weights=[3, 1]))
    assert record["cache"]["identity"] == view.identity() != open_combined(dumped).identity()


def test_every_python_name_is_there() -> None:
    import softlabels

    assert softlabels.combine is combine and softlabels.open_combined is open_combined
    assert softlabels.CombineOptions is CombineOptions and callable(softlabels.concatenate)
    assert issubclass(CacheError, softlabels.SoftlabelsError) and issubclass(ConfigError, softlabels.SoftlabelsError)
