"""A cache in words: what it holds, from what, how large. Read from the manifest alone."""

from __future__ import annotations

from typing import Any

from softlabels.cache.format import EXAMPLES, CombinedCard, Manifest


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
    }


def _made_of(card: CombinedCard) -> dict[str, Any]:
    """Of which caches, and how."""
    rule = {"how": card.how} | ({"choose": card.choose} if card.choose else {})
    weights = [part.weight for part in card.caches if part.weight is not None]
    return rule | ({"weights": weights} if weights else {}) | {"teachers": [part.teacher for part in card.caches]}


def clipped_values(manifest: Manifest) -> dict[str, int]:
    """How many values of each field were clipped; fields without any are left out."""
    return {name: table.clipped for name, table in sorted(manifest.shards.items()) if table.clipped}
