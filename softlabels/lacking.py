"""What a cache lacks for a recipe's losses comes in; the message that says so, and the dump that adds it, go out."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping

from softlabels.cache import Cache
from softlabels.cache.reader import capture_of
from softlabels.config import DumpOptions


def what_is_lacking(lacking: Mapping[str, str], cache: Cache) -> str:
    """The message for a cache without `lacking` (each field with the loss that needs it), and what adds them."""
    have = ", ".join(sorted(cache.fields)) or "no field"
    first = min(lacking)
    more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    said = f"loss '{lacking[first]}' needs {first}{more}; cache {cache.shown} holds {have}. "
    if cache.manifest.combined is not None:
        return said + _where_of_combined(cache)
    return f"{said}Add it with: {_dump_command(cache)}{capture_options(lacking)}"


def _where_of_combined(cache: Cache) -> str:
    """No teacher stands behind a cache made of others: what it lacks is in them, or was never dumped."""
    assert cache.manifest.combined is not None
    names = ", ".join(dict.fromkeys(part.teacher for part in cache.manifest.combined.caches))
    if cache.manifest.combined.how == "rows":
        return (
            f"It is made of the rows of other caches (teacher {names}): dump the field in each, and combine them again"
        )
    return (
        f"It is made of several teachers' caches ({names}) and holds what they say together: layers are one teacher's "
        f"own, so train from that teacher's cache, or leave the loss out"
    )


def _dump_command(cache: Cache) -> str:
    """The command that goes on with the cache: another configuration would be refused."""
    manifest, usual = cache.manifest, DumpOptions()
    said = {"--split": manifest.corpus.split, "--teacher": manifest.teacher.name, "--out": cache.shown}
    if manifest.teacher.task != "sequence-classification":
        said["--task"] = manifest.teacher.task
    said["--max-length"] = str(manifest.dump.max_length)
    for key in ("shard_rows", "batch_tokens", "dtype"):
        if getattr(manifest.dump, key) != getattr(usual, key):
            said[f"--{key.replace('_', '-')}"] = str(getattr(manifest.dump, key))
    if (masking := manifest.dump.masking) is not None:
        for key in ("times", "rate", "seed", "smoothing", "targets"):
            if getattr(masking, key) != getattr(usual.masking, key):
                said["--maskings" if key == "times" else f"--mask-{key}"] = str(getattr(masking, key))
    options = [f" {option} {shlex.quote(value)}" for option, value in said.items() if value]
    text = "" if manifest.dump.text else " --no-text"
    return f"softlabels dump {shlex.quote(manifest.corpus.source)}{''.join(options)}{text}"


def capture_options(fields: Iterable[str]) -> str:
    """The options of a dump that give `fields`, a signal's layers in one."""
    layers: dict[tuple[str, str], set[str]] = {}  # (capture, what stands behind the @)
    for field in sorted(fields):
        capture, _, rest = capture_of(field).partition(":")
        layer, at, form = rest.partition("@")
        layers.setdefault((capture, at + form), set()).update([layer] if layer else [])
    return "".join(
        f" --capture {capture}{':' if numbers else ''}{','.join(sorted(numbers, key=int))}{form}"
        for (capture, form), numbers in layers.items()
    )
