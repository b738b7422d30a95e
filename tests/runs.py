"""Small runs for tests of what is done with runs: a student that is its teacher, and students made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from softlabels.cache import Cache, open_cache
from softlabels.config import DumpOptions
from softlabels.corpus import Corpus
from softlabels.dump import dump
from softlabels.runs import RunRecord, save_run
from softlabels.students.linear import LinearStudent, fit_linear
from softlabels.teacher import load_teacher
from softlabels.types import Example
from tests.models import LABEL_NAMES, TEXTS, save_teacher

ROWS = [Example(f"row-{i}", text, None, name if i % 4 else None) for i, (text, name) in enumerate(TEXTS)]


def corpus_of(examples: list[Example], label_names: list[str] | None = None) -> Corpus:
    return Corpus("made", None, examples, label_names or LABEL_NAMES)


def record(student: str, *, label_names: Sequence[str] = LABEL_NAMES, seed: int = 0) -> RunRecord:
    return RunRecord(
        student=student,
        options={},
        label_names=list(label_names),
        max_length=64,
        losses={"kl": 1.0},
        temperature="1",
        seed=seed,
        epochs_run=1,
        best_epoch=1,
        train_seconds=1.0,
        train_rows=len(TEXTS),
        labelled_rows=0,
        validation={},
        cache={},
        versions={},
    )


@dataclass(frozen=True)
class Taught:
    """A cache of ROWS, and the run of a student that is its very teacher."""

    cache: Cache
    twin: Path


def make_taught(folder: Path) -> Taught:
    """In `folder`: teacher/, cache/ and twin/."""
    teacher = save_teacher(folder / "teacher")
    wide = {name: value * 4 for name, value in load_file(teacher / "model.safetensors").items()}
    save_file(wide, teacher / "model.safetensors", metadata={"format": "pt"})  # else it says the same of every text
    dump(corpus_of(ROWS), teacher=str(teacher), out=folder / "cache", options=DumpOptions(shard_rows=16))
    student = AutoModelForSequenceClassification.from_pretrained(teacher)
    save_run(folder / "twin", student, record("transformer"), tokenizer=load_teacher(str(teacher)).tokenizer)
    return Taught(open_cache(folder / "cache"), folder / "twin")


def by_words(out: Path, logits: Mapping[str, Sequence[float]], of: RunRecord | None = None) -> Path:
    """A run in `out` that gives a text the sum of the logits of the words in it that it knows."""
    of = of or record("linear")
    words = sorted(logits)
    fitted = fit_linear(
        words,
        num_labels=len(of.label_names),
        logits=np.zeros((len(words), len(of.label_names))),
        options={"min_df": 1, "char_ngrams": 0, "word_ngrams": 1},
    )
    terms = fitted.vocabularies[0].terms
    weights = np.array([logits[term] for term in terms], dtype=np.float32)
    save_run(out, LinearStudent(fitted.vocabularies, False, weights, np.zeros(len(of.label_names), np.float32)), of)
    return out
