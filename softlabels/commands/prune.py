"""`softlabels prune`: a student with its least weights or attention heads at zero."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from softlabels.commands.options import Json, RunFolder
from softlabels.commands.show import print_report

EXAMPLES = (
    "Example:  softlabels prune runs/bilstm --magnitude 0.5 --out runs/sparse, then train-student cache "
    "--student runs/sparse --out runs/sparse-again"
)


def prune_command(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="the run folder for the pruned student")],
    magnitude: Annotated[
        float | None, typer.Option(help="this share of the weights of every matrix, the smallest ones, becomes zero")
    ] = None,
    scope: Annotated[
        str, typer.Option(help="'matrix', or 'all': the smallest of all matrices taken together")
    ] = "matrix",
    heads: Annotated[
        float | None,
        typer.Option(help="this share of a transformer's attention heads goes; each layer keeps one"),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="choose heads by what they do to the distance to the teacher; without it by their weights"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Set a student's least weights or attention heads to zero; trained further, they stay zero."""
    from softlabels.config import PruneOptions, build_options

    given = {"magnitude": magnitude, "scope": scope, "heads": heads}
    options = build_options(PruneOptions, given, where="prune")
    from softlabels.cache import open_cache
    from softlabels.prune import prune

    report = prune(run, out=out, options=options, cache=None if cache is None else open_cache(cache))
    print_report(asdict(report), as_json=as_json)
