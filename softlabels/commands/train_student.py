"""`softlabels train-student`: a student trained from one cache or several."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from softlabels.commands.options import (
    Choose,
    Cpu,
    EvalSplit,
    Json,
    Label,
    LearningRate,
    Mean,
    Patience,
    Resume,
    StudentOption,
    Text,
    Weights,
    combine_options,
)
from softlabels.commands.show import print_report
from softlabels.errors import ConfigError

EXAMPLES = (
    "Examples:  softlabels train-student cache --student bilstm --out runs/bilstm "
    "--loss kl=0.7 --loss ce=0.3 --temperature 3   |   softlabels train-student cache-a cache-b cache-c --mean "
    "probabilities --student bilstm --out runs/taught-by-three   |   accelerate launch --multi_gpu --num_processes 4 "
    "-m softlabels train-student cache --student transformer --out runs/four   |   softlabels train-student "
    "s3://bucket/sst2 --student bilstm --out runs/from-s3"
)


def train_student_command(
    caches: Annotated[
        list[str],
        typer.Argument(
            metavar="CACHE ...",
            help="a cache, or several: then what their teachers say together, as combine has it; a folder, or the URL "
            "that it was pushed to, of which only what is read is fetched",
        ),
    ],
    out: Annotated[Path, typer.Option(help="the run folder that the student leaves")],
    student: Annotated[
        str | None,
        typer.Option(
            help="bilstm, word_average, lstm_attention, transformer or linear; the folder of a finished run, to train "
            "its student further; with --recipe the name of one of its students"
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="train as a recipe says, a YAML file or a name (pkd-skip, tinybert, …): losses, phases, sizes"
        ),
    ] = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=WEIGHT",
            help="kl, mse_logits, jsd, dkd, dist, … (a wrong name is answered with the list); may be repeated; ce=1 "
            "alone is the baseline on hard labels; losses on layers are said in a recipe",
        ),
    ] = None,
    temperature: Annotated[
        str | None,
        typer.Option(help="3 (by default 1), or 5:1 (moving from 5 to 1), or 5:1:cosine, or flsw:4, for every row"),
    ] = None,
    option: StudentOption = None,
    eval_corpus: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="CORPUS",
            help="a labelled corpus that picks the best epoch; by default a tenth of the rows is held out",
        ),
    ] = None,
    eval_split: EvalSplit = None,
    prune: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=SHARE",
            help="magnitude=0.5 or heads=0.25: prune the student before the first step; it stays so; may be repeated",
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, sgd, or adadelta (which wants --lr 1.0)")] = None,
    lr: LearningRate = None,
    patience: Patience = None,
    validation: Annotated[
        float | None, typer.Option(min=0, max=0.9, help="share of the rows that is held out without --eval")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=2, help="learn from the first so many rows of the cache only, for a trial")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="SHARDS",
            help="shuffle within so many shards at a time, for a cache that is larger than memory; 8 mixes well",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    resume: Resume = False,
    cache_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="of caches at a URL: the local cache in ~/.cache/softlabels (or $SOFTLABELS_CACHE) has at most so "
            "much, e.g. 50GB; by default $SOFTLABELS_CACHE_SIZE, or 10GB",
        ),
    ] = None,
    mean: Mean = None,
    weights: Weights = None,
    choose: Choose = None,
    text: Text = None,
    label: Label = None,
    as_json: Json = False,
    cpu: Cpu = False,
) -> None:
    """STAGE 2: train a student from a cache, or from several at once."""
    from softlabels.config import StudentOptions, build_options, parse_losses, parse_options
    from softlabels.recipes import student_of_recipe

    if student is None and recipe is None:
        raise ConfigError("say what to train: --student bilstm, or --recipe NAME")
    given: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "lr": lr,
        "patience": patience,
        "validation": validation,
        "rows": rows,
        "window": window,
        "seed": seed,
        "temperature": temperature,
        "losses": None if loss is None else parse_losses(loss),
        "prune": parse_options(prune) if prune else None,
    }
    given = {key: value for key, value in given.items() if value is not None}
    chosen = parse_options(option or [])
    if recipe is not None:
        start = student_of_recipe(recipe, student).model_dump(exclude_unset=True)
        for phase in start.get("phases", []):  # what is said here goes before what a phase says
            for key in {"epochs", "batch_size", "lr"} & given.keys():
                phase.pop(key, None)
        values = start | given | {"options": start.get("options", {}) | chosen}
    else:
        default = {"losses": {"mse_logits": 1.0}} if student == "linear" else {}
        values = default | given | _which_student(student or "") | {"options": chosen}
    options = build_options(StudentOptions, values, where="train-student")
    combining = combine_options(mean, weights, choose, where="train-student")
    if len(caches) == 1 and combining.model_fields_set:
        raise ConfigError(f"--{min(combining.model_fields_set)} combines several caches, and one is given")
    from softlabels.cache import open_cache
    from softlabels.cache.combined import open_combined
    from softlabels.cache.stream import parse_size
    from softlabels.corpus import read_corpus
    from softlabels.train import train_student
    from softlabels.training.processes import is_first_process

    room = None if cache_size is None else parse_size(cache_size)
    if len(caches) == 1:
        opened = open_cache(caches[0], cache_size=room)
    else:
        opened = open_combined(caches, combining, cache_size=room)
        for line in opened.overlap() if is_first_process() else []:
            typer.echo(line, err=True)
    corpus = None if eval_corpus is None else read_corpus(eval_corpus, split=eval_split, text=text, label=label)
    report = train_student(opened, out=out, options=options, validation=corpus, resume=resume, cpu=cpu)
    if is_first_process():
        print_report(asdict(report), as_json=as_json)


def _which_student(name: str) -> dict[str, Any]:
    """The kind of a new student, or the folder of one that is trained further."""
    from softlabels.students import STUDENT_NAMES

    if name in STUDENT_NAMES or not Path(name).is_dir():
        return {"student": name}
    from softlabels.runs import read_record

    return {"student": read_record(Path(name)).student, "from_run": name}
