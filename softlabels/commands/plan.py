"""`softlabels plan`: what a dump would cost."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from softlabels.commands.options import (
    BatchTokens,
    CorpusArgument,
    Cpu,
    Dtype,
    Json,
    Label,
    Maskings,
    MaskRate,
    MaskTargets,
    MaxLength,
    NoText,
    Rows,
    ShardRows,
    Splits,
    Teacher,
    Text,
    Trust,
)
from softlabels.commands.show import print_json
from softlabels.tables import plan_table

EXAMPLES = "Example:  softlabels plan texts.csv --teacher ./teacher --out cache --capture logits --capture qkv:6"


def plan_command(
    corpus: CorpusArgument,
    teacher: Teacher,
    out: Annotated[
        Path, typer.Option(help="where the cache would go: its free disk is told; nothing is written")
    ] = Path("."),
    split: Splits = None,
    capture: Annotated[list[str] | None, typer.Option(metavar="WHAT", help="as for dump; may be repeated")] = None,
    task: Annotated[str | None, typer.Option(help="as for dump: what the teacher was made for")] = None,
    rows_sample: Annotated[
        int,
        typer.Option(
            min=1, help="how many rows are tokenised, spread over the corpus by their length; 200 are 5 % off for maps"
        ),
    ] = 2000,
    epochs: Annotated[int, typer.Option(min=1, help="that a student trains: for when the cache has paid")] = 10,
    maskings: Maskings = None,
    mask_rate: MaskRate = None,
    mask_targets: MaskTargets = None,
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = None,
    shard_rows: ShardRows = None,
    dtype: Dtype = None,
    codec: Annotated[
        str | None, typer.Option(help="float32, float16 (default), bfloat16, or int8 (not maps), as for dump")
    ] = None,
    no_text: NoText = False,
    text: Text = None,
    label: Label = None,
    rows: Rows = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    cpu: Cpu = False,
) -> None:
    """What a dump would cost in bytes and time, found on a sample before it is paid.

    Bytes are those of the whole corpus. Time is of the forward pass on this machine, three batches of it, with the
    captures and without (a bare model over the same batches); writing goes on behind it. When has the cache paid for
    itself? Without it every student of E epochs (--epochs) costs E teacher passes of F seconds, with it all students
    together cost the dump's one of D: after D / F epochs, or D / (E * F) students, rounded up; every one after that
    saves E * F. Nothing is refused for want of disk: it is told.
    """
    from softlabels.config import DumpOptions, build_options

    masking = {"times": maskings, "rate": mask_rate, "targets": mask_targets}
    given = {
        "capture": capture or None,
        "task": task,
        "masking": {key: value for key, value in masking.items() if value is not None} or None,
        "max_length": max_length,
        "batch_tokens": batch_tokens,
        "shard_rows": shard_rows,
        "dtype": dtype,
        "codec": codec,
    }
    options = build_options(
        DumpOptions,
        {key: value for key, value in given.items() if value is not None} | {"text": not no_text},
        where="plan",
    )
    from softlabels.corpus import read_corpus
    from softlabels.plan import plan_dump
    from softlabels.teacher import teacher_task

    found = teacher_task(teacher, task, trust_remote_code=trust_remote_code)
    data = read_corpus(corpus, split=split, text=text, label=label, rows=rows, task=found)
    plan = plan_dump(
        data,
        teacher=teacher,
        options=options,
        out=out,
        sample=rows_sample,
        epochs=epochs,
        device="cpu" if cpu else None,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json(asdict(plan))
    else:
        typer.echo(plan_table(plan))
