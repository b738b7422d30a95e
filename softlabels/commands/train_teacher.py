"""`softlabels train-teacher`: a model fine-tuned on a corpus, so that it can teach."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from softlabels.commands.options import CorpusArgument, Cpu, EvalSplit, Json, Label, Rows, Text, Trust
from softlabels.commands.show import print_report

EXAMPLES = (
    "Examples:  softlabels train-teacher train.csv --model all-MiniLM-L6-v2 --out teacher   |   softlabels "
    "train-teacher train.csv --model bert-mini --from-scratch --tokenizer bert-base-chinese --out teacher   |   "
    "softlabels train-teacher texts.txt --model bert-base-uncased --task masked-lm --epochs 1 --out language-teacher"
)


def train_teacher_command(
    corpus: CorpusArgument,
    model: Annotated[str, typer.Option(help="the pretrained model to fine-tune: a folder or a Hugging Face name")],
    out: Annotated[Path, typer.Option(help="the folder for the teacher")],
    task: Annotated[
        str,
        typer.Option(
            help="sequence-classification, or a language model, trained on any texts: masked-lm (15 % of the tokens "
            "are masked, others in every epoch) or causal-lm; where the model has no such head, it gets a new one"
        ),
    ] = "sequence-classification",
    split: Annotated[
        str | None, typer.Option(help="which split(s) of the corpus, joined by +; by default train")
    ] = None,
    eval_corpus: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="CORPUS",
            help="a corpus that picks the best epoch, by accuracy (its rows are labelled) or perplexity; by default a "
            "tenth of the rows is held out",
        ),
    ] = None,
    eval_split: EvalSplit = None,
    epochs: Annotated[int, typer.Option(min=1)] = 5,
    lr: Annotated[float, typer.Option(help="the highest learning rate")] = 5e-5,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="tokens a text; by default what the model takes, at most 512")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    from_scratch: Annotated[
        bool,
        typer.Option(
            "--from-scratch",
            help="start from random weights: --model is a folder with a config.json, or a shape's name (bert-mini, "
            "mobilebert-teacher, …)",
        ),
    ] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="with --from-scratch: a folder or model whose tokenizer to take; by default the model folder's"
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="KEY=VALUE", help="with --from-scratch: a size, e.g. layers=4; may be repeated"
        ),
    ] = None,
    text: Text = None,
    label: Label = None,
    rows: Rows = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    cpu: Cpu = False,
) -> None:
    """Fine-tune a classifier or a language model, or train a new one, so that it can teach."""
    from softlabels.config import TeacherTraining, build_options, parse_options

    checked = build_options(
        TeacherTraining,
        {
            "task": task,
            "epochs": epochs,
            "lr": lr,
            "batch_size": batch_size,
            "max_length": max_length,
            "seed": seed,
            "from_scratch": from_scratch,
            "tokenizer": tokenizer,
            "options": parse_options(option or []),
        },
        where="train-teacher",
    )
    from softlabels.corpus import read_corpus
    from softlabels.teacher import TeacherOptions, train_teacher

    data = read_corpus(corpus, split=split, text=text, label=label, rows=rows, task=checked.task)
    validation = None
    if eval_corpus is not None:
        validation = read_corpus(eval_corpus, split=eval_split, text=text, label=label, task=checked.task)
    options = TeacherOptions(
        **checked.model_dump(exclude={"rows"}),
        trust_remote_code=trust_remote_code,
        device="cpu" if cpu else None,
    )
    report = train_teacher(data, model=model, out=out, options=options, validation=validation)
    print_report(asdict(report), as_json=as_json)
