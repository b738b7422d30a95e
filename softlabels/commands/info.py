"""`softlabels info`: what a cache holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softlabels.commands.options import Json
from softlabels.commands.show import print_json
from softlabels.tables import lay_out, show_facts, show_size

EXAMPLES = "Examples:  softlabels info cache   |   softlabels info s3://bucket/sst2"


def info(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="a folder, or the URL that it was pushed to")],
    as_json: Json = False,
) -> None:
    """What a cache holds, from what, how large."""
    from softlabels.cache.format import read_manifest
    from softlabels.cache.info import describe
    from softlabels.cache.urls import is_url

    if is_url(cache):
        from softlabels.cache.remote import open_remote

        manifest = open_remote(cache).manifest
    else:
        manifest = read_manifest(Path(cache))
    facts = describe(manifest)
    if as_json:
        print_json(facts)
        return
    fields, personal = facts.pop("fields"), facts.pop("may_carry_personal_data")
    head = ["field", "kind", "type", "width", "size"]
    rows = [
        [name, f["kind"], f["type"], str(f["width"]), show_size(f["bytes"]) if "bytes" in f else "–"]
        for name, f in fields.items()
    ]
    may = "\n".join(f"  {line}" for line in personal)
    typer.echo(f"{show_facts(facts)}\n\n{lay_out(head, rows)}\n\nmay carry personal data:\n{may}")
