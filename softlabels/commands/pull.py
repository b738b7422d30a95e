"""`softlabels pull`: a cache, or part of it, from a URL."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from softlabels.commands.options import Fields, Json, Layers, Threads
from softlabels.commands.show import print_report
from softlabels.errors import ConfigError


def pull_command(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="where the cache was pushed, or where its folder lies: also https://")
    ],
    cache: Annotated[
        Path, typer.Argument(metavar="CACHE", help="the folder; one that holds the same cache gets what it lacks")
    ],
    field: Fields = None,
    layer: Layers = None,
    rows: Annotated[
        str | None, typer.Option(metavar="A:B", help="only the rows from number A, the first is 0, to before B; 0:1000")
    ] = None,
    threads: Threads = 8,
    plan: Annotated[bool, typer.Option("--plan", help="only say how much would travel")] = False,
    as_json: Json = False,
) -> None:
    """Fetch a cache, or some of its fields or rows; only what is missing here or differs travels.

    The same command goes on after any interruption, a later one adds fields. Every file is checked on arrival. What
    was pulled is a cache like any other. To train without pulling, give train-student the URL.
    """
    from softlabels.cache.pull import plan_pull, pull

    span = None if rows is None else _parse_rows(rows)
    if plan:
        found = plan_pull(url, cache, fields=field or None, layers=layer or None, rows=span)
        print_report(asdict(found), as_json=as_json)
        return
    report = pull(url, cache, fields=field or None, layers=layer or None, rows=span, threads=threads)
    print_report(asdict(report), as_json=as_json)


def _parse_rows(text: str) -> tuple[int | None, int | None]:
    found = re.fullmatch(r"\s*(\d*)\s*:\s*(\d*)\s*", text)
    if found is None:
        raise ConfigError(
            f"--rows {text}: give two row numbers, the first row is 0 and the last one isn't taken: 0:1000"
        )
    return (int(found[1]) if found[1] else None, int(found[2]) if found[2] else None)


PULL_EXAMPLES = (
    "Examples:  softlabels pull s3://bucket/sst2 cache   |   softlabels pull https://host/caches/sst2 cache --field "
    "logits --plan   |   softlabels pull sftp://anna@host/data/sst2 part --field hidden --layer 6 --rows 0:10000"
)
