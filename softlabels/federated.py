"""A federation of parties, from their own rows to their students; a stage whose inputs haven't changed is skipped.

Each party trains a teacher on rows that only it has, and dumps the teacher's logits on a corpus that all have; these
caches are combined, and each party's student learns from the consensus (FedMD, Li and Wang 2019, arXiv:1910.03581;
FedDF, Lin et al. 2020, arXiv:2006.07242). Here one process plays all parties, each in a folder of its own:

    parties/NAME/        its rows (private.jsonl), models (teacher-1/, student-1/, revisited-1/, alone/), cache-own/
    shared/round-1/NAME/     what leaves it: a cache of logits on the common rows, without their texts
    shared/round-1/consensus/    the caches combined, from which every party's student learns
    tests/               logits of teachers on the test rows, to score them and their consensus with
    stages/NAME.json     what a stage was given (its fingerprint), what it found and how long it took
    results.json         the table as data

Nothing outside parties/NAME/ holds a row or a weight of that party: rows of the common corpus or of the test that are
also among those that the parties have are left out of these. In every round but the first a party's student starts from
what it was after the one before, as FedMD's models do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from softlabels.cache import open_cache
from softlabels.cache.combine import combine
from softlabels.cache.files import lock, write_file
from softlabels.config import BASE, DumpOptions, EvaluateOptions, StudentOptions, TeacherTraining, fingerprint
from softlabels.corpus import Corpus, encode_labels, read_corpus
from softlabels.dump import dump
from softlabels.errors import CorpusError
from softlabels.evaluate import evaluate, score_teacher
from softlabels.foresight import check_federation
from softlabels.parties import split_among_parties
from softlabels.pretrained import resolve_pretrained
from softlabels.recipes import FederatedRecipe, on_labels_alone, plain_options
from softlabels.running.students import train_run
from softlabels.stages import Made, Stages
from softlabels.teacher import TeacherOptions, train_teacher
from softlabels.training.preparing import check_options
from softlabels.types import NO_LABEL


@dataclass(frozen=True, slots=True)
class PartyRow:
    """One party. Accuracies and macro-F1 are on the common test rows."""

    party: str
    rows: int  # labelled ones of its own
    classes: dict[str, int]  # of each class how many
    teacher_accuracy: float  # of what it trained on its own rows
    alone_accuracy: float  # of its student, trained on its own labels alone
    alone_macro_f1: float
    accuracy: float  # of its student, trained on the consensus (and then on its own rows, with `revisit`)
    macro_f1: float
    each_round: list[float]  # accuracies

    @property
    def gain(self) -> float:
        return self.accuracy - self.alone_accuracy


@dataclass(frozen=True, slots=True)
class FederatedResult:
    """What a federation gave."""

    recipe: str
    out: str
    rows: list[PartyRow]
    consensus_accuracy: list[float]  # of each round, of what the parties say together
    common_rows: int
    shared_bytes: int  # that left the parties, in all rounds
    skipped: int

    @property
    def mean_gain(self) -> float:
        return mean(row.gain for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        rows = [asdict(row) | {"gain": row.gain} for row in self.rows]
        return asdict(self) | {"rows": rows, "mean_gain": self.mean_gain}


@dataclass(frozen=True, slots=True)
class _Party:
    """A party and what it alone knows."""

    name: str
    number: int
    folder: Path
    own: Corpus
    key: str  # a fingerprint of its rows


@dataclass(frozen=True, slots=True)
class _Shared:
    """What all parties know."""

    recipe: FederatedRecipe
    common: Corpus
    test: Corpus
    base: str  # the model that they start from
    stages: Stages
    cpu: bool

    @property
    def device(self) -> str | None:
        return "cpu" if self.cpu else None


def run_federation(
    recipe: FederatedRecipe, *, out: Path, say: Callable[[str], None] = lambda line: None, cpu: bool = False
) -> FederatedResult:
    """Run `recipe` in the folder `out`. Interrupted, the same call goes on; repeated, it costs a few seconds."""
    out = Path(out)
    check_options(recipe.student)
    check_federation(recipe)
    train, common, test = _read(recipe, say)
    parts = split_among_parties(
        train,
        recipe.parties.count,
        skew=recipe.parties.skew,
        seed=recipe.parties.seed,
        rows=recipe.parties.rows,
    )
    base = recipe.teacher.model
    if not (recipe.teacher.train and recipe.teacher.train.from_scratch):
        base = str(resolve_pretrained(base))
    out.mkdir(parents=True, exist_ok=True)
    with lock(out):
        stages = Stages(out, say)
        shared = _Shared(recipe, common, test, base, stages, cpu)
        parties = [_settle(out, number, part) for number, part in enumerate(parts, start=1)]
        teachers = {party.name: _train_teacher(shared, party) for party in parties}
        scores: dict[str, list[dict[str, Any]]] = {party.name: [] for party in parties}
        first, agreed, sent = {}, [], 0
        for number in range(1, recipe.rounds + 1):
            heard = {party.name: _hear(shared, party, teachers[party.name], number) for party in parties}
            if number == 1:
                first = {party.name: _test(shared, party, teachers[party.name], 1) for party in parties}
            tests = first if number == 1 else {p.name: _test(shared, p, teachers[p.name], number) for p in parties}
            consensus = _agree(shared, list(heard.values()), f"shared/round-{number}/consensus")
            together = _agree(shared, list(tests.values()), f"tests/round-{number}/consensus")
            agreed.append(_accuracy(together))
            sent += sum(made.found["bytes"] for made in heard.values())
            for party in parties:
                model = _learn(shared, party, consensus, number, before=teachers[party.name] if number > 1 else None)
                scores[party.name].append(_score(shared, party, model, f"round-{number}"))
                teachers[party.name] = model
        rows = [
            _row(shared, party, _accuracy(first[party.name]), _learn_alone(shared, party), scores[party.name])
            for party in parties
        ]
        result = FederatedResult(recipe.name, str(out), rows, agreed, len(common.examples), sent, stages.skipped)
        stages.finish(result.to_dict())
    return result


def _read(recipe: FederatedRecipe, say: Callable[[str], None]) -> tuple[Corpus, Corpus, Corpus]:
    """The labelled rows, the common ones without their labels, and those of the test; none of the labelled in either.

    A party must not learn from labels of the others, nor from its own twice, nor be tested on rows with labels that it
    or another may have learned.
    """
    choice = recipe.corpus
    read = partial(read_corpus, text=choice.text, label=choice.label)
    train = read(choice.source, split=choice.train, rows=choice.rows)
    private = {(row.text, row.text_b) for row in train.examples if row.label is not None}

    def without_private(name: str, corpus: Corpus) -> Corpus:
        others = [row for row in corpus.examples if (row.text, row.text_b) not in private]
        if not others:
            raise CorpusError(
                f"every row of the {name} corpus {corpus.source} is also a labelled row of {train.source}, which "
                f"parties keep to themselves: give other rows as corpus.{name}"
            )
        if known := len(corpus.examples) - len(others):
            say(f"{known:,} of {len(corpus.examples):,} {name} rows are also among the parties': they are left out")
        return replace(corpus, examples=others)

    common_source, test_source = choice.common_source or choice.source, choice.test_source or choice.source
    common = without_private("common", read(common_source, split=choice.common, rows=choice.rows))
    test = without_private("test", read(test_source, split=choice.test))
    names = train.label_names or []
    if all(label == NO_LABEL for label in encode_labels(test.examples, names)):
        raise CorpusError(f"test corpus {test.source} has no labelled row to score the parties on")
    bare = [replace(row, label=None) for row in common.examples]
    return train, replace(common, examples=bare, label_names=None), test


def _settle(out: Path, number: int, own: Corpus) -> _Party:
    """The party's folder, with its rows."""
    name = f"party-{number}"
    folder = out / "parties" / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({k: v for k, v in asdict(row).items() if v is not None}) for row in own.examples]
    write_file(folder / "private.jsonl", ("\n".join(lines) + "\n").encode())
    return _Party(name, number, folder, own, fingerprint([own.hash, own.label_names]))


# -------------------------------------------------------------------------------------------- what a party does


def _tune(shared: _Shared, party: _Party, model: str, key: Any, training: TeacherTraining, *, name: str) -> Made:
    """`model`, fine-tuned on the party's own rows into the folder `name` of it."""
    out = party.folder / name
    settings = training.model_dump(exclude={"rows"}) | {"seed": training.seed + party.number}
    inputs = fingerprint([key, party.key, settings])

    def work() -> dict[str, Any]:
        shutil.rmtree(out, ignore_errors=True)  # of other inputs
        options = TeacherOptions(**settings, device=shared.device)
        return {"seconds": train_teacher(party.own, model=model, out=out, options=options).seconds}

    found = shared.stages.run(f"{party.name}-{name}", inputs, work, makes=out / "config.json")
    return Made(str(out), inputs, found["seconds"], found)


def _train_teacher(shared: _Shared, party: _Party) -> Made:
    choice = shared.recipe.teacher
    assert choice.train is not None  # FederatedRecipe asks for it
    return _tune(shared, party, shared.base, [choice.model], choice.train, name="teacher-1")


def _hear(shared: _Shared, party: _Party, teacher: Made, number: int) -> Made:
    """What leaves the party: its logits on the common rows."""
    return _dump(shared, teacher, shared.common, f"shared/round-{number}/{party.name}")


def _test(shared: _Shared, party: _Party, teacher: Made, number: int) -> Made:
    return _dump(shared, teacher, shared.test, f"tests/round-{number}/{party.name}")


def _dump(shared: _Shared, teacher: Made, corpus: Corpus, name: str, *, under: Path | None = None) -> Made:
    out = (under or shared.stages.out) / name
    options: DumpOptions = shared.recipe.dump.model_copy(update={"capture": ["logits"], "text": False})
    key = fingerprint([teacher.key, corpus.hash, options.model_dump()])

    def work() -> dict[str, Any]:
        shutil.rmtree(out, ignore_errors=True)
        report = dump(corpus, teacher=teacher.path, out=out, options=options, device=shared.device)
        return {"rows": report.rows, "bytes": report.bytes}

    stage = name.replace("/", "-") if under is None else f"{under.name}-{name}"
    found = shared.stages.run(stage, key, work, makes=out / "manifest.json")
    return Made(str(out), key, found["seconds"], found)


def _agree(shared: _Shared, caches: list[Made], name: str) -> Made:
    """What the parties say together."""
    out, options = shared.stages.out / name, shared.recipe.combine
    key = fingerprint([options.model_dump(), *(cache.key for cache in caches)])

    def work() -> dict[str, Any]:
        shutil.rmtree(out, ignore_errors=True)
        report = combine([cache.path for cache in caches], out=out, options=options)
        return {"rows": report.rows}

    found = shared.stages.run(name.replace("/", "-"), key, work, makes=out / "manifest.json")
    return Made(str(out), key, found["seconds"], found)


def _learn(shared: _Shared, party: _Party, consensus: Made, number: int, *, before: Made | None) -> Made:
    """The party's student of the consensus, from what it was `before`, and then of its own rows with `revisit`."""
    options = shared.recipe.student
    if before is not None:
        start = {"init_from": before.path, "init_layers": "all", "init_head": True}
        options = options.model_copy(update={"options": start, "from_run": None})
    student = _train(shared, party, consensus, options, name=f"student-{number}", start=before)
    if shared.recipe.revisit is None:
        return student
    return _tune(shared, party, student.path, student.key, shared.recipe.revisit, name=f"revisited-{number}")


def _learn_alone(shared: _Shared, party: _Party) -> dict[str, Any]:
    """The scores of the same student on the party's own labels, without the others."""
    own = _dump(shared, _train_teacher(shared, party), party.own, "cache-own", under=party.folder)
    student = shared.recipe.student
    options = plain_options(student, on_labels_alone(student, shared.recipe.hard_epochs))
    return _score(shared, party, _train(shared, party, own, options, name="alone"), "alone")


def _train(
    shared: _Shared, party: _Party, cache: Made, options: StudentOptions, *, name: str, start: Made | None = None
) -> Made:
    out = party.folder / name
    changes: dict[str, Any] = {"seed": options.seed + party.number}
    if options.options.get("init_from") == BASE:
        changes["options"] = options.options | {"init_from": shared.base}
    own = options.model_copy(update=changes)
    key = fingerprint([own.model_dump(), cache.key, *([start.key] if start is not None else [])])
    work = partial(train_run, Path(cache.path), out, own, cpu=shared.cpu)
    found = shared.stages.run(f"{party.name}-{name}", key, work, makes=out / "config.json")
    return Made(str(out), key, found["seconds"], found)


# ------------------------------------------------------------------------------------------------------- scores


def _score(shared: _Shared, party: _Party, model: Made, name: str) -> dict[str, Any]:
    """Accuracy and macro-F1 of a party's model on the test rows: of a run, or of one that was fine-tuned after it."""

    def work() -> dict[str, Any]:
        if (Path(model.path) / "run.json").exists():
            found = evaluate(Path(model.path), shared.test, options=EvaluateOptions(keep=False))
            return {"accuracy": found.accuracy, "macro_f1": found.macro_f1}
        return _figures(_dump(shared, model, shared.test, f"tests-{Path(model.path).name}", under=party.folder))

    return shared.stages.run(f"{party.name}-score-{name}", [model.key, shared.test.hash], work)


def _figures(cache: Made) -> dict[str, float]:
    scores = score_teacher(open_cache(cache.path))
    assert scores is not None  # _read asks for labelled test rows
    return scores


def _accuracy(cache: Made) -> float:
    return _figures(cache)["accuracy"]


def _row(
    shared: _Shared, party: _Party, taught: float, alone: dict[str, Any], scores: list[dict[str, Any]]
) -> PartyRow:
    names = party.own.label_names or []
    labels = encode_labels(party.own.examples, names)
    return PartyRow(
        party=party.name,
        rows=len(labels),
        classes={str(name): labels.count(number) for number, name in enumerate(names)},
        teacher_accuracy=taught,
        alone_accuracy=alone["accuracy"],
        alone_macro_f1=alone["macro_f1"],
        accuracy=scores[-1]["accuracy"],
        macro_f1=scores[-1]["macro_f1"],
        each_round=[score["accuracy"] for score in scores],
    )
