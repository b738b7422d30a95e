"""Folders come in; the runs in them go out, each with its evaluation on one corpus, the same for all."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from softlabels.errors import ConfigError, SoftlabelsError, StudentError
from softlabels.evaluations import Kept, KeptEvaluation, is_current, kept_names, read_card, read_kept
from softlabels.runs import RECORD, RunRecord, read_record
from softlabels.types import LANGUAGE_MODELS


@dataclass(frozen=True)
class Member:
    """A run, and what was found of it."""

    path: Path
    record: RunRecord
    kept: Kept

    @property
    def right(self) -> np.ndarray:
        """(M,) whether it has each labelled row right."""
        rows = self.kept.rows
        labelled = rows.labels >= 0
        return rows.student[labelled].argmax(axis=1) == rows.labels[labelled]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A run that the report does not show, and why."""

    path: Path
    why: str


@dataclass(frozen=True)
class Gathered:
    """The runs of a report. Their evaluations are of the same rows and classes."""

    members: list[Member]
    left_out: list[LeftOut]
    evaluation: str  # its name


@dataclass(frozen=True)
class _Candidate:
    """A run, and the cards of its evaluations that are of the files it has now."""

    path: Path
    record: RunRecord
    cards: dict[str, KeptEvaluation]


def gather(
    paths: Sequence[Path], *, corpus: str | None, update: Callable[[int], object] = lambda count: None
) -> Gathered:
    """Every run in `paths`, with its evaluation on `corpus`: an evaluation's name, or the beginning of one.

    `corpus` may be None where all were evaluated on one corpus only. A run that can't be shown is left out, with the
    reason. ConfigError or StudentError where none can be, or where the runs don't belong on one page.
    """
    candidates, left_out = [], []
    for path in find_runs(paths):
        try:
            candidates.append(_read_candidate(path))
        except SoftlabelsError as error:
            left_out.append(LeftOut(path, str(error)))
    name = _choose([candidate.cards for candidate in candidates], corpus, left_out)
    members = []
    for candidate in candidates:
        if name not in candidate.cards:
            left_out.append(LeftOut(candidate.path, _how_to_add(candidates, name)))
            continue
        try:
            members.append(Member(candidate.path, candidate.record, read_kept(candidate.path, name)))
        except SoftlabelsError as error:
            left_out.append(LeftOut(candidate.path, str(error)))
        update(1)
    if not members:
        raise StudentError("; ".join(f"{item.path}: {item.why}" for item in left_out[:5]))
    _refuse_strangers(members)
    return Gathered(members, left_out, name)


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run folders among `paths` and beneath them, each once; StudentError where one leads to none."""
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise StudentError(f"there is no folder {path}: name runs, or folders with runs in them")
        beneath = []
        for folder, inside, files in os.walk(path):
            if RECORD in files:
                beneath.append(Path(folder))
                inside.clear()  # a run holds no other runs
            inside[:] = sorted(name for name in inside if not name.startswith("."))
        if not beneath:
            read_record(path)  # says what it is instead
            raise StudentError(f"{path} holds no finished run: a run has a {RECORD}")
        for run in beneath:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _read_candidate(path: Path) -> _Candidate:
    record = read_record(path)
    if record.task in LANGUAGE_MODELS:
        raise StudentError(
            "a language model: `softlabels evaluate` prints its perplexity, a report has no place for it"
        )
    names = kept_names(path)
    cards = {name: read_card(path, name) for name in names}
    current = {name: card for name, card in cards.items() if is_current(card, record)}
    if names and not current:
        raise StudentError("its evaluations are of weights that it no longer has: evaluate it again")
    return _Candidate(path, record, current)


def _choose(evaluated: Sequence[dict[str, KeptEvaluation]], wanted: str | None, left_out: list[LeftOut]) -> str:
    """The name of the evaluation that the report is about."""
    counts = Counter(name for cards in evaluated for name in cards)
    if not counts:
        reasons = "".join(f". {item.path}: {item.why}" for item in left_out[:3])
        raise StudentError(
            "none of the runs has an evaluation to report: add one to each with "
            f"`softlabels evaluate RUN CORPUS --cache CACHE`, of a sweep to each folder in its trials/{reasons}"
        )
    known = ", ".join(f"{name} ({count} run{'s' * (count > 1)})" for name, count in counts.most_common())
    if wanted is None:
        if len(counts) > 1:
            raise ConfigError(f"the runs were evaluated on several corpora: {known}. Choose one with --corpus NAME")
        return next(iter(counts))
    fitting = [wanted] if wanted in counts else [name for name in counts if name.startswith(wanted)]
    if len(fitting) != 1:
        raise ConfigError(f"--corpus {wanted} names {len(fitting) or 'none'} of the evaluations; there are: {known}")
    return fitting[0]


def _how_to_add(candidates: Sequence[_Candidate], name: str) -> str:
    corpus = next(candidate.cards[name].figures.corpus for candidate in candidates if name in candidate.cards)
    source, _, split = (
        corpus.partition(":") if corpus.count(":") == 1 and "/" not in corpus.rpartition(":")[2] else (corpus, "", "")
    )
    return (
        f"not evaluated on {name}: softlabels evaluate RUN {source}{f' --split {split}' if split else ''} --cache CACHE"
    )


def _refuse_strangers(members: Sequence[Member]) -> None:
    """ConfigError where two runs have other classes or rows: no figure of one could be held against the other's."""
    first = members[0]
    for member in members[1:]:
        if member.kept.card.label_names != first.kept.card.label_names:
            raise ConfigError(
                f"{member.path} has the classes {', '.join(member.kept.card.label_names[:9])}, {first.path} "
                f"{', '.join(first.kept.card.label_names[:9])}: make a report of each"
            )
        same = member.kept.card.corpus_hash == first.kept.card.corpus_hash
        same = same and np.array_equal(member.kept.rows.labels, first.kept.rows.labels)
        if not (same and member.kept.rows.ids == first.kept.rows.ids):
            raise ConfigError(f"{member.path} and {first.path} were evaluated on other rows: make a report of each")
