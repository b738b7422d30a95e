"""`softlabels dump`: what a teacher says of a corpus, kept in a cache."""

from __future__ import annotations

from dataclasses import asdict
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
    MaskSmoothing,
    MaskTargets,
    MaxLength,
    NoText,
    Rows,
    ShardRows,
    Splits,
    Teacher,
    Text,
    Trust,
    ray_options,
)
from softlabels.commands.show import print_report, say
from softlabels.errors import ConfigError

EXAMPLES = (
    "Examples:  softlabels dump texts.csv --teacher ./teacher --out cache --capture logits --capture hidden:3,6 "
    "  |   softlabels dump images.csv --teacher ./vit --out cache   |   in a Slurm array of 8 jobs:  softlabels dump "
    "texts.csv --teacher ./teacher --out cache --part $((SLURM_ARRAY_TASK_ID + 1))/8   |   softlabels dump texts.csv "
    "--teacher ./teacher --out s3://bucket/cache --engine ray --address ray://head:10001 --workers 8"
)


def dump_command(
    corpus: CorpusArgument,
    teacher: Teacher,
    out: Annotated[
        str,
        typer.Option(
            help="the cache; an unfinished one goes on, a finished one gets the fields it lacks. With --engine ray a "
            "folder that all machines share, or a URL: s3://bucket/cache"
        ),
    ],
    split: Splits = None,
    capture: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT",
            help="logits, pooled, hidden:LAYERS, hidden:LAYERS@cls or @mean, qkv:LAYERS, attention:LAYERS or "
            "attention:LAYERS@scores (LAYERS: 3,6 or 1-6 or all); of a language model vocab:exact, vocab:topk=64 or "
            "vocab:topk=64,factors=64,packed; may be repeated; by default logits, or what is nearest to them",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="what the teacher was made for: sequence-classification, multi-label-classification, regression, "
            "token-classification, masked-lm, causal-lm, seq2seq-lm, sentence-embedding or image-classification; by "
            "default what its config.json says"
        ),
    ] = None,
    maskings: Maskings = None,
    mask_rate: MaskRate = None,
    mask_smoothing: MaskSmoothing = None,
    mask_targets: MaskTargets = None,
    mask_seed: Annotated[int | None, typer.Option(min=0, help="of masked-lm: another one masks other tokens")] = None,
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = None,
    shard_rows: ShardRows = None,
    dtype: Dtype = None,
    codec: Annotated[
        str | None,
        typer.Option(
            help="hidden states, Q/K/V and maps are stored as float32, float16 (default), bfloat16, or int8 (not maps)"
        ),
    ] = None,
    overflow: Annotated[
        str | None, typer.Option(help="values that the codec cannot hold: refuse (default), or clip and count them")
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="N|cuda:0,cuda:1",
            help="several GPUs, a process each: how many, or which; cpu,cpu for processes on the CPU",
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="only the I-th of N parts, for N machines with the same command: into one shared folder, which the "
            "last of them completes, or each into its own, put together by combine --rows; the same bytes either way",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(metavar="local|ray", help="ray: on the workers of a Ray cluster (pip install 'softlabels[ray]')"),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="of the Ray cluster: local (default; one on this machine, for this dump alone), auto (the one that "
            "this machine is part of), ray://HOST:10001, or HOST:6379"
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="of the Ray cluster; by default as many as there is room for")
    ] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(help="0.5: two share one; 0: on the CPU; by default 1 where there are any")
    ] = None,
    cpus_per_worker: Annotated[
        float | None, typer.Option(help="what a worker takes of its machine, and its threads; by default 1")
    ] = None,
    compile_teacher: Annotated[
        bool,
        typer.Option("--compile", help="the teacher through torch.compile; it costs a minute or more at the start"),
    ] = False,
    no_text: NoText = False,
    text: Text = None,
    label: Label = None,
    rows: Rows = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    cpu: Cpu = False,
) -> None:
    """STAGE 1: keep what a teacher says of a corpus."""
    from softlabels.config import DumpOptions, build_options

    masking = {
        "times": maskings,
        "rate": mask_rate,
        "seed": mask_seed,
        "smoothing": mask_smoothing,
        "targets": mask_targets,
    }
    given = {
        "capture": capture or None,
        "task": task,
        "masking": {key: value for key, value in masking.items() if value is not None} or None,
        "max_length": max_length,
        "batch_tokens": batch_tokens,
        "shard_rows": shard_rows,
        "dtype": dtype,
        "codec": codec,
        "overflow": overflow,
    }
    options = build_options(
        DumpOptions,
        {key: value for key, value in given.items() if value is not None}
        | {"text": not no_text, "compile": compile_teacher},
        where="dump",
    )
    if devices is not None and cpu:
        raise ConfigError("dump takes --cpu or --devices, not both: --devices cpu,cpu is two processes on the CPU")
    from softlabels.cache.parts import parse_part

    asked = None if part is None else parse_part(part)
    ray = ray_options(
        engine,
        {
            "address": address,
            "workers": workers,
            "gpus_per_worker": gpus_per_worker,
            "cpus_per_worker": cpus_per_worker,
        },
        command="dump",
        cpu=cpu,
    )
    if ray is not None and devices is not None:
        raise ConfigError("dump takes --devices or --engine ray, not both: give --workers and --gpus-per-worker")
    from softlabels.corpus import read_corpus
    from softlabels.dump import dump
    from softlabels.engines.devices import parse_devices
    from softlabels.teacher import teacher_task

    chosen = None if devices is None else parse_devices(devices)
    found = teacher_task(teacher, task, trust_remote_code=trust_remote_code)
    data = read_corpus(corpus, split=split, text=text, label=label, rows=rows, task=found)
    report = dump(
        data,
        teacher=teacher,
        out=out,
        options=options,
        device="cpu" if cpu else None,
        devices=chosen,
        ray=ray,
        trust_remote_code=trust_remote_code,
        part=asked,
    )
    for line in report.lost:
        say(f"{line}; another did its work")
    if report.truncated:
        say(f"{report.truncated} of {report.rows} texts were longer than the teacher takes and were cut")
    if report.batch_tokens < options.batch_tokens:
        say(f"memory ran out: batches of {report.batch_tokens} tokens were taken instead of {options.batch_tokens}")
    for field, count in report.clipped.items():
        say(f"{count} values of {field} were beyond what {options.codec} holds and were clipped")
    if not report.rows:
        say(f"part {part} has no rows: a part has whole files, of {options.shard_rows} rows each (--shard-rows)")
    if not report.complete:
        say(f"{out} is complete once the other parts are in it; folders of parts are put together by combine --rows")
    print_report(asdict(report), as_json=as_json)
