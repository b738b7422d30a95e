"""Another way to a cache: texts come in with the logits that a teacher behind an API or on another machine gave them.

The texts are tokenised by a tokenizer of the user's choice, which the students then share; the logits go in as they
are, and no model is run. As with a dump, an interrupted import goes on with the same call.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from transformers import PretrainedConfig

from softlabels.cache.build import CacheBuild, build_cache, check_rows, plan_manifest, teacher_card
from softlabels.cache.format import EXAMPLES, DumpCard, FieldSpec
from softlabels.cache.writer import FieldShard, join_hash
from softlabels.config import ImportOptions
from softlabels.corpus import Corpus, encode_labels
from softlabels.errors import CorpusError
from softlabels.pretrained import load_tokenizer, resolve_pretrained
from softlabels.progress import progress
from softlabels.tokens import Tokenized, resolve_max_length, tokenize
from softlabels.types import NO_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELD = "logits"
SMALLEST = float(np.finfo(np.float32).tiny)  # what a probability of zero is taken for: its logarithm is -87.3
_SUM_TOLERANCE = 1e-2  # how far from 1 the probabilities of a row may add up to: APIs round them
_SHOWN = 5  # at most so many rows are listed in a message


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import did."""

    cache: Path
    rows: int
    new_rows: int
    truncated: int
    zeros: int  # probabilities of zero, which have no logarithm and became the smallest that float32 has
    accuracy: float | None  # of the logits on the labelled rows: near chance where --label-names are in a wrong order
    seconds: float
    bytes: int


def import_logits(
    corpus: Corpus,
    values: Sequence[Any] | np.ndarray,
    *,
    tokenizer: str,
    out: Path,
    probabilities: bool = False,
    options: ImportOptions | None = None,
) -> ImportReport:
    """Keep `values`, the logits of each row of `corpus` (or its `probabilities`), in the cache `out`.

    `values[i]` is a list of C numbers, or JSON text of one, for row i; or all are one array (N, C). Probabilities are
    stored as log-probabilities, which lose nothing: log p differs from the teacher's own logits by one constant a row,
    so softmax(log p / T) is what the teacher would have said at any temperature T. `tokenizer` is a folder or a name.

    CorpusError where a row has no usable values or the classes' names are not known, TeacherError where the tokenizer
    doesn't load.
    """
    started = time.monotonic()
    options, out = options or ImportOptions(), Path(out)
    check_rows(corpus)
    logits = _check_values(corpus, values, probabilities=probabilities)  # (N, C)
    names = _choose_names(corpus, options, logits.shape[1])
    labels = encode_labels(corpus.examples, names)
    loaded = _load_tokenizer(tokenizer)
    zeros = int((logits == 0).sum()) if probabilities else 0
    if probabilities:
        logits = np.log(np.maximum(logits, SMALLEST))
    logits = logits.astype(np.float32)
    manifest = plan_manifest(
        corpus,
        labelled=sum(label != NO_LABEL for label in labels),
        teacher=teacher_card(
            loaded,
            name=options.teacher_name or f"imported from {corpus.source}",
            # there are no weights to hash: what was said stands for who said it, so that other logits are refused
            weights_hash=f"imported-{xxhash.xxh3_128(logits.tobytes()).hexdigest()}",
            label_names=names,
        ),
        tokenizer=loaded,
        dump=DumpCard(
            max_length=resolve_max_length(options.max_length, loaded, PretrainedConfig()),
            shard_rows=options.shard_rows,
            batch_tokens=1,  # no batch went through a model
            dtype="float32",
            text=options.text,
        ),
        fields={FIELD: FieldSpec(kind="row", type="float32", width=len(names))},
    )
    with build_cache(out, manifest, tokenizer=loaded, config=None) as build:
        new_rows = _write(build, corpus, loaded, logits=logits, labels=labels)
        final = build.finish()
    labelled = [row for row, label in enumerate(labels) if label != NO_LABEL]
    right = logits[labelled].argmax(axis=1) == np.array(labels)[labelled]
    return ImportReport(
        cache=out,
        rows=len(corpus.examples),
        new_rows=new_rows,
        truncated=final.corpus.truncated,
        zeros=zeros,
        accuracy=float(right.mean()) if labelled else None,
        seconds=time.monotonic() - started,
        bytes=sum(table.total for table in final.shards.values()),
    )


def _write(
    build: CacheBuild,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    logits: np.ndarray,
    labels: Sequence[int],
) -> int:
    """Write the shards that are missing; how many rows they have."""
    size, total, done = build.manifest.dump.shard_rows, len(corpus.examples), 0
    with progress(total, description="import") as update:
        for shard in build.shards():
            rows = slice(shard * size, min((shard + 1) * size, total))
            missing = build.missing(shard)
            if missing:
                tokens = tokenize(
                    tokenizer,
                    corpus.examples[rows],
                    max_length=build.manifest.dump.max_length,
                    labels=labels[rows],
                )
                _write_shard(build, missing, shard, tokens, logits[rows])
                done += len(tokens.examples)
            update(rows.stop - rows.start)
    return done


def _write_shard(build: CacheBuild, missing: Sequence[str], shard: int, tokens: Tokenized, logits: np.ndarray) -> None:
    manifest, examples = build.manifest, tokens.examples
    if EXAMPLES in missing:
        build.write_examples(shard, tokens)
    if FIELD in missing:
        lengths = np.array([len(example.input_ids) for example in examples])
        writer = FieldShard(build.folder, FIELD, manifest.fields[FIELD], shard=shard, tokens=lengths)
        try:
            ids = [example.id for example in examples]
            writer.write(np.arange(len(examples)), torch.from_numpy(logits), ids=ids)
            writer.commit(join_hash(examples))
        finally:
            writer.discard()


def _check_values(corpus: Corpus, values: Sequence[Any] | np.ndarray, *, probabilities: bool) -> np.ndarray:
    """(N, C) float64. CorpusError says which rows have something else, and what."""
    what = "probabilities" if probabilities else "logits"
    rows = [_numbers(value) for value in (values.tolist() if isinstance(values, np.ndarray) else values)]
    if len(rows) != len(corpus.examples):
        raise CorpusError(f"there are {len(rows)} rows of {what} for {len(corpus.examples)} rows of {corpus.source}")
    _refuse(corpus, [row is None for row in rows], f"no list of numbers as {what}")
    counts = [len(row) for row in rows if row is not None]
    common = max(set(counts), key=counts.count)
    if common < 2:
        raise CorpusError(f"corpus {corpus.source} has {common} {what} a row: at least two classes are needed")
    _refuse(corpus, [count != common for count in counts], f"another number of {what} than the {common} of most rows")
    whole = np.array(rows, dtype=np.float64)
    largest = np.finfo(np.float32).max
    _refuse(corpus, ~(np.abs(whole) <= largest).all(axis=1), f"NaN, infinite or too large {what}")
    if probabilities:
        _refuse(corpus, (whole < 0).any(axis=1), "probabilities below zero (are they logits? use --logits)")
        off = np.abs(whole.sum(axis=1) - 1) > _SUM_TOLERANCE
        _refuse(corpus, off, "probabilities that do not add up to 1 (are they logits? use --logits)")
    return whole


def _numbers(value: Any) -> list[float] | None:
    """A row's list of numbers; None where it is something else. CSV files have it as text, `[0.1, 2.5]`."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list | tuple):
        return None
    if not all(isinstance(number, Real) and not isinstance(number, bool) for number in value):
        return None
    return [float(number) if abs(number) < 1e300 else float("inf") for number in value]


def _refuse(corpus: Corpus, bad: Any, fault: str) -> None:
    """CorpusError with the rows where `bad`, if any."""
    rows = np.flatnonzero(np.asarray(bad, dtype=bool)).tolist()
    if rows:
        ids = ", ".join(corpus.examples[row].id for row in rows[:_SHOWN])
        more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        raise CorpusError(
            f"corpus {corpus.source}: {len(rows)} of {len(corpus.examples)} rows have {fault} (id {ids}{more}): "
            f"mend these rows or leave them out"
        )


def _choose_names(corpus: Corpus, options: ImportOptions, classes: int) -> list[str]:
    """The classes' names in the order of the logits. They are never guessed: a wrong order would teach the opposite."""
    if options.label_names is not None:
        if len(options.label_names) != classes:
            raise CorpusError(
                f"--label-names names {len(options.label_names)} classes, but the rows of {corpus.source} have "
                f"{classes} logits"
            )
        return options.label_names
    indices = [str(number) for number in range(classes)]
    if corpus.label_names is not None and set(corpus.label_names) <= set(indices):
        return indices  # the labels are the classes' numbers
    there = f" Its labels are {', '.join(corpus.label_names[:20])}." if corpus.label_names else ""
    raise CorpusError(
        f"the names of the {classes} classes of {corpus.source} are not known in the order of their logits: give them "
        f"with --label-names, separated by commas.{there}"
    )


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """From a folder, which needs no model beside it, or from the model of that name."""
    folder = Path(name).expanduser()
    return load_tokenizer(folder if folder.is_dir() else resolve_pretrained(name))
