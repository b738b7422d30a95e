"""Small caches for tests, written by hand: rows with known tokens, and whatever values a test gives their fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softlabels.cache.build import CacheBuild
from softlabels.cache.files import write_file
from softlabels.cache.format import LIST_LIMIT, MANIFEST, Manifest, to_json
from softlabels.cache.writer import FieldShard, join_hash, labels_type, write_examples
from softlabels.tokens import count_row_targets
from softlabels.types import NO_LABEL, Task, TokenizedExample

VOCABULARY = 100


def rows_of(lengths: Sequence[int]) -> list[TokenizedExample]:
    """Row i has `lengths[i]` tokens, all from arithmetic, so that they are the same wherever the test runs."""
    return [
        TokenizedExample(
            id=f"row{i}",
            input_ids=np.array([(7 * i + 3 * k) % VOCABULARY for k in range(length)], np.int32),
            token_type_ids=np.array([k % 2 for k in range(length)], np.uint8),
            label=i % 2 if i % 3 else NO_LABEL,
            text=f"text {i} – é",
            text_b="other" if i == 2 else None,
        )
        for i, length in enumerate(lengths)
    ]


def manifest_of(
    rows: Sequence[TokenizedExample],
    fields: Mapping[str, Mapping[str, Any]],
    *,
    shard_rows: int,
    task: Task = "sequence-classification",
) -> Manifest:
    """The manifest of a cache of `rows` before its first shard."""
    labelled = sum(row.label != NO_LABEL for row in rows)
    return Manifest.model_validate(
        {
            "format": "softlabels-cache",
            "version": 1,
            "complete": False,
            "teacher": {
                "name": "a teacher",
                "weights_hash": "0",
                "task": task,
                "label_names": ["no", "yes"] if task == "sequence-classification" else [],
                "vocab_size": VOCABULARY,
                "pad_token_id": 0,
                "unk_token_id": 1,
                "token_types": True,
            },
            "tokenizer_hash": "0",
            "corpus": {"source": "x.csv", "split": None, "hash": "0", "rows": len(rows), "labelled": labelled},
            "dump": {"max_length": 16, "shard_rows": shard_rows, "batch_tokens": 64, "dtype": "float32", "text": True},
            "fields": fields,
            "shard_rows": [],
            "shard_tokens": [],
            "join": "",
            "shards": {},
            "versions": {"softlabels": "1"},
        }
    )


def write_cache(
    folder: Path,
    rows: Sequence[TokenizedExample],
    fields: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, Sequence[np.ndarray]],
    *,
    shard_rows: int,
    limit: int = LIST_LIMIT,
    task: Task = "sequence-classification",
) -> Manifest:
    """A whole cache. `values[field][row]` are float32: (width,), (L, width) or (width, L, L) by the field's kind.

    Of a language model's cache a target field has (T, width) of its own type. `limit` is the number of values in a
    record batch.
    """
    build = CacheBuild(folder, manifest_of(rows, fields, shard_rows=shard_rows, task=task))
    labels = labels_type(build.manifest.teacher)
    for shard in build.shards():
        first = shard * shard_rows
        part = rows[first : first + shard_rows]
        write_examples(folder, part, shard=shard, vocab_size=VOCABULARY, token_types=True, text=True, labels=labels)
        targets = np.array([count_row_targets(row) for row in part])
        tokens = np.array([len(row.input_ids) for row in part])
        for field, spec in build.manifest.fields.items():
            writer = FieldShard(folder, field, spec, shard=shard, tokens=tokens, targets=targets, limit=limit)
            for i in reversed(range(len(part))):
                batch = torch.from_numpy(values[field][first + i])
                batch = batch if spec.kind == "target" else batch[None]
                writer.write(np.array([i]), batch, ids=[part[i].id])
            writer.commit(join_hash(part))
    write_file(folder / MANIFEST, to_json(build.manifest))
    return build.finish()
