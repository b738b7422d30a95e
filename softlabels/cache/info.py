"""A cache in words: what it holds, from what, how large. Read from the manifest alone."""

from __future__ import annotations

from typing import Any

from softlabels.cache.format import EXAMPLES, CombinedCard, Manifest
from softlabels.types import IMAGES, LANGUAGE_MODELS, SEQ2SEQ


def describe(manifest: Manifest) -> dict[str, Any]:
    """Plain facts about a cache, for `softlabels info`."""
    clipped = clipped_values(manifest)
    fields = {
        name: {"kind": spec.kind, "type": spec.type, "width": spec.width}
        | ({"bytes": manifest.shards[name].total} if manifest.complete else {})
        | ({"clipped": clipped[name]} if name in clipped else {})
        for name, spec in sorted(manifest.fields.items())
    }
    return {
        "complete": manifest.complete,
        "rows": manifest.corpus.rows,
        "labelled": manifest.corpus.labelled,
        "truncated": manifest.corpus.truncated if manifest.complete else None,
        "tokens": sum(manifest.shard_tokens) if manifest.complete else None,
        "shards": len(manifest.shard_rows) if manifest.complete else None,
        "corpus": manifest.corpus.source + (f":{manifest.corpus.split}" if manifest.corpus.split else ""),
        "texts": manifest.dump.text,
        "teacher": manifest.teacher.name,
        **({} if manifest.combined is None else {"combined": _made_of(manifest.combined)}),
        "task": manifest.teacher.task,
        "classes": manifest.teacher.label_names,
        "max_length": manifest.dump.max_length,
        "fields": fields,
        "examples_bytes": manifest.shards[EXAMPLES].total if manifest.complete else None,
        "bytes": sum(table.total for table in manifest.shards.values()) if manifest.complete else None,
        "versions": manifest.versions,
        "may_carry_personal_data": personal_data(manifest),
    }


def personal_data(manifest: Manifest) -> list[str]:
    """By what a cache may carry personal data, if its corpus or its teacher's training data had any; a line each."""
    images, texts, fields = manifest.teacher.task == IMAGES, manifest.dump.text, manifest.fields
    lines = []
    if texts:
        lines.append("examples: the raw texts" + (" and target texts" if manifest.teacher.task == SEQ2SEQ else ""))
    if not images:
        without = "" if texts else "; --no-text left out the texts, not these"
        lines.append(
            f"examples: token ids, from which tokenizer/ rebuilds the texts all but letter for letter{without}"
        )
    lines.append(
        "examples: row ids as the corpus has them, and hashes of each row's "
        + ("pixels" if images else "tokens")
        + ", by which someone who has a row can tell that it is here"
    )
    if manifest.corpus.labelled and manifest.teacher.task not in LANGUAGE_MODELS:
        lines.append("examples: labels, which may say something of a person")
    inside = sorted(name for name in fields if _shows_inputs(name))
    outputs = sorted(fields.keys() - set(inside))
    if outputs:
        lines.append(
            f"{_some(outputs)}: what the teacher answers can tell whether a row was among its training data"
            + (", and recite some of these" if manifest.teacher.task in LANGUAGE_MODELS else "")
        )
    if inside:
        what = "images" if images else "texts"
        lines.append(f"{_some(inside)}: {what} can be rebuilt in part from states and attention inside a model")
    lines.append("manifest.json: the names of corpus and teacher as they were given, folders included")
    return lines


def _shows_inputs(name: str) -> bool:
    """Whether a field is of the inside of a model, rather than its answer."""
    return name == "vocab_states" or not name.startswith(("logits", "vocab_"))


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _made_of(card: CombinedCard) -> dict[str, Any]:
    """Of which caches, and how."""
    rule = {"how": card.how} | ({"choose": card.choose} if card.choose else {})
    weights = [part.weight for part in card.caches if part.weight is not None]
    return rule | ({"weights": weights} if weights else {}) | {"teachers": [part.teacher for part in card.caches]}


def clipped_values(manifest: Manifest) -> dict[str, int]:
    """How many values of each field were clipped; fields without any are left out."""
    return {name: table.clipped for name, table in sorted(manifest.shards.items()) if table.clipped}
