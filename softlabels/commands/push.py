"""`softlabels push`: a cache to a URL."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from softlabels.commands.options import Fields, Json, Layers, Threads
from softlabels.commands.show import print_report


def push_command(
    cache: Annotated[Path, typer.Argument(metavar="CACHE")],
    url: Annotated[
        str, typer.Argument(metavar="URL", help="s3://, gs://, hf://, sftp://, file:// or any other of fsspec")
    ],
    field: Fields = None,
    layer: Layers = None,
    compress: Annotated[
        bool | None,
        typer.Option(
            "--compress/--no-compress",
            help="pack float fields for the way, high and low bytes apart (zstd): 15 % less of float16, 30 % of "
            "bfloat16; other tools then can't read them there. By default only where it makes the push faster",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="read back what is there already, and send again what is damaged")
    ] = False,
    threads: Threads = 8,
    as_json: Json = False,
) -> None:
    """Put a cache, or some of its fields, where others can pull it or train from it.

    Only what is missing there travels; the same command goes on after any interruption, and a later one adds fields.
    The manifest goes last, so nobody sees half a cache, whoever pushes at the same time. Credentials come from where
    fsspec and the provider look for them (AWS_ACCESS_KEY_ID, ~/.aws, ssh keys, hf auth login …); they are never stored.
    """
    from softlabels.cache.push import push

    report = push(
        cache, url, fields=field or None, layers=layer or None, compress=compress, check=check, threads=threads
    )
    print_report(asdict(report), as_json=as_json)


PUSH_EXAMPLES = (
    "Examples:  softlabels push cache s3://bucket/sst2   |   softlabels push cache sftp://anna@host/data/sst2 --field "
    "logits   |   softlabels push cache hf://datasets/team/sst2 --field hidden --layer 6"
)
