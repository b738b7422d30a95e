"""`softlabels combine`: one cache of several."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from softlabels.commands.options import Choose, Json, Mean, Weights, combine_options
from softlabels.commands.show import print_json
from softlabels.errors import ConfigError
from softlabels.tables import combine_table

EXAMPLES = (
    "Examples:  softlabels combine cache-a cache-b cache-c --out cache --mean probabilities --weights 2,1,1 "
    "  |   softlabels combine party-1 party-2 --out consensus --keep   |   "
    "softlabels combine cache-a cache-b --out cache --choose label   |   "
    "softlabels combine part-1 part-2 part-3 --out whole --rows"
)


def combine_command(
    caches: Annotated[list[Path], typer.Argument(metavar="CACHE CACHE ...", help="two caches or more")],
    out: Annotated[Path, typer.Option(help="the cache of all; an unfinished one goes on")],
    mean: Mean = None,
    weights: Weights = None,
    choose: Choose = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="each teacher's logits too, as fields logits.01, logits.02, …")
    ] = False,
    rows: Annotated[
        bool,
        typer.Option(
            "--rows",
            help="instead: the caches are parts of one corpus, dumped alike with one teacher; their rows are put one "
            "after the other, with all their fields. What dump --part made becomes what one dump would have made",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """One cache of several: what their teachers say together, or all their rows.

    Rows are joined by id and token hash; where tokenizers differ, by id and text. Those that all caches have are kept,
    in the order of the first, whose texts, labels and tokenizer the result has. Classes are joined by name. The mean
    of probabilities is stored as its logarithm: it is that mean at temperature 1. The mean of logits is the geometric
    mean of the probabilities, at every temperature.
    """
    options = combine_options(mean, weights, choose, keep=keep, where="combine")
    if rows and options.model_fields_set:
        raise ConfigError(f"--rows mixes nothing, so it takes no --{min(options.model_fields_set)}")
    from softlabels.cache.combine import combine
    from softlabels.cache.concatenate import concatenate

    report = concatenate(caches, out=out) if rows else combine(caches, out=out, options=options)
    if as_json:
        print_json(asdict(report))
    else:
        typer.echo(combine_table(report))
