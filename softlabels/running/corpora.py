"""The corpora of a recipe, and what has to hold of them before a teacher is trained."""

from __future__ import annotations

from softlabels.config import fingerprint
from softlabels.corpus import Corpus, check_trainable, encode_labels, read_corpus
from softlabels.errors import ConfigError, CorpusError
from softlabels.recipes import CorpusChoice, TeacherChoice
from softlabels.types import Task


class Corpora:
    """The recipe's corpora, each read once."""

    def __init__(self, choice: CorpusChoice, teacher: TeacherChoice, task: Task = "sequence-classification") -> None:
        self.choice, self.training, self.task = choice, teacher.train, task
        self._read: dict[tuple[str, str | None, int | None], Corpus] = {}
        self._put: dict[str, Corpus] = {}

    def key(self, use: str) -> str:
        """A fingerprint of a corpus: of its rows, whatever file they came from."""
        corpus = self.read(use)
        return fingerprint([corpus.hash, corpus.label_names])

    def read(self, use: str) -> Corpus:
        """The corpus for a `use`: 'train', 'transfer' or 'test'."""
        if use in self._put:
            return self._put[use]
        source, split = self._place(use)
        rows = self._rows(use)
        if (source, split, rows) not in self._read:
            self._read[source, split, rows] = read_corpus(
                source, split=split, text=self.choice.text, label=self.choice.label, rows=rows, task=self.task
            )
        return self._read[source, split, rows]

    def put(self, use: str, corpus: Corpus) -> None:
        """From now on `corpus` is what `read(use)` gives."""
        self._put[use] = corpus

    def _place(self, use: str) -> tuple[str, str | None]:
        choice = self.choice
        if use == "test":
            return choice.test_source or choice.source, choice.test
        return choice.source, choice.train if use == "train" or choice.transfer is None else choice.transfer

    def _rows(self, use: str) -> int | None:
        if use == "test":
            return None
        if use == "train" and self.training is not None and self.training.rows is not None:
            return min(self.training.rows, self.choice.rows or self.training.rows)
        return self.choice.rows


def check_test(name: str, choice: CorpusChoice, corpora: Corpora) -> None:
    """ConfigError or CorpusError where there is nothing to test on."""
    if choice.test is None and choice.test_source is None:
        raise ConfigError(f"recipe {name}: say what to test on: corpus.test (a split) or corpus.test_source (a file)")
    test = corpora.read("test")
    if all(example.label is None for example in test.examples):
        raise CorpusError(f"test corpus {test.source} has no labelled row to score the students on")


def check_teacher_rows(teacher: TeacherChoice, own: Corpora, corpora: Corpora) -> None:
    """CorpusError where a teacher can't be trained on its `own` rows, or knows none of the labels of the others."""
    if teacher.train is not None:
        train = own.read("train")
        check_trainable(train)
        for use in ("transfer", "test"):
            encode_labels(corpora.read(use).examples, train.label_names or [])
