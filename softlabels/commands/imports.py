"""`softlabels import`: a cache of logits that a teacher gave elsewhere."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from softlabels.commands.options import CorpusArgument, Json, Label, NoText, Rows, ShardRows, Text
from softlabels.commands.show import print_report, say
from softlabels.errors import ConfigError

EXAMPLES = (
    "Example:  softlabels import scored.parquet --out cache --logits scores --label-names no,yes "
    "--tokenizer bert-base-uncased"
)


def import_command(
    source: CorpusArgument,
    out: Annotated[Path, typer.Option(help="the cache; an unfinished one goes on")],
    tokenizer: Annotated[str, typer.Option(help="what the texts are tokenised by: a folder or a Hugging Face name")],
    logits: Annotated[str | None, typer.Option(metavar="COLUMN", help="the column with a list of logits a row")] = None,
    probabilities: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="the column with a list of probabilities a row, instead")
    ] = None,
    label_names: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="the classes' names, in the order of the logits")
    ] = None,
    teacher_name: Annotated[str | None, typer.Option(help="what to call the teacher")] = None,
    split: Annotated[str | None, typer.Option(help="which split(s) of the source, joined by +")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="tokens a text; by default what the tokenizer says, at most 512")
    ] = None,
    shard_rows: ShardRows = None,
    no_text: NoText = False,
    text: Text = None,
    label: Label = None,
    rows: Rows = None,
    as_json: Json = False,
) -> None:
    """Make a cache of logits that a teacher gave elsewhere."""
    from softlabels.config import ImportOptions, build_options

    column = logits if logits is not None else probabilities
    if column is None or (logits is not None and probabilities is not None):
        raise ConfigError("import needs the column of the logits: either --logits COLUMN or --probabilities COLUMN")
    given = {
        "label_names": None if label_names is None else [name.strip() for name in label_names.split(",")],
        "teacher_name": teacher_name,
        "max_length": max_length,
        "shard_rows": shard_rows,
    }
    options = build_options(
        ImportOptions,
        {key: value for key, value in given.items() if value is not None} | {"text": not no_text},
        where="import",
    )
    from softlabels.corpus import read_column, read_corpus
    from softlabels.imports import import_logits

    option = "--logits" if logits is not None else "--probabilities"
    data = read_corpus(source, split=split, text=text, label=label, rows=rows)
    values = read_column(source, column, option=option, split=split, rows=rows)
    report = import_logits(
        data, values, tokenizer=tokenizer, out=out, probabilities=probabilities is not None, options=options
    )
    if report.truncated:
        say(f"{report.truncated} of {report.rows} texts were longer than --max-length and were cut")
    if report.zeros:
        say(f"{report.zeros} probabilities are zero and were stored as 1.2e-38, the smallest that float32 has")
    print_report(asdict(report), as_json=as_json)
