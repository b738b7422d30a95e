"""The command line: parse, call one stage, print. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import errno
import gc
import io
import math
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from softlabels.commands import card, sign, sweep
from softlabels.commands import evaluate as evaluate_command
from softlabels.commands import report as report_command
from softlabels.commands.options import CorpusArgument, Cpu, Json, Label, Rows, Text, ray_options
from softlabels.commands.pull import PULL_EXAMPLES, pull_command
from softlabels.commands.push import PUSH_EXAMPLES, push_command
from softlabels.commands.show import print_json, print_report
from softlabels.errors import ConfigError, SoftlabelsError
from softlabels.tables import (
    combine_table,
    federation_table,
    fidelity_table,
    lay_out,
    plan_table,
    recipe_table,
    show_facts,
    show_size,
    verdict_line,
)

if TYPE_CHECKING:
    from softlabels.config import CombineOptions
    from softlabels.corpus import Corpus

app = typer.Typer(
    name="softlabels",
    help="Knowledge distillation from precomputed teachers: run the teacher once, train students from its cache.",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Mean = Annotated[
    str | None,
    typer.Option(
        help="of several teachers: the mean of their logits (by default) or of their probabilities, or the median of "
        "their logits"
    ),
]
Weights = Annotated[
    str | None, typer.Option(metavar="W,W,...", help="of the means: a number for each cache, e.g. 2,1,1")
]
Choose = Annotated[
    str | None,
    typer.Option(
        help="instead of a mean, for each row one teacher's logits: of the surest of the row's label (label; rows "
        "without one take the mean), or of the surest of all (entropy)"
    ),
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="run the Python code that the model brings; only for models you trust"),
]


def _print_version(asked: bool) -> None:
    if asked:
        import softlabels

        typer.echo(f"softlabels {softlabels.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example:  softlabels demo")
def demo(
    out: Annotated[Path, typer.Option(help="the folder for everything the demo makes")] = Path("runs/demo"),
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="change the recipe, e.g. teacher.train.epochs=2"),
    ] = None,
    as_json: Json = False,
    cpu: Cpu = False,
) -> None:
    """The quickstart recipe on the built-in corpus."""
    _run("quickstart", out, changes or [], as_json=as_json, cpu=cpu)


@app.command(
    "run",
    epilog="Examples:  softlabels run quickstart --out runs/try   |   "
    "softlabels run my.yaml --set students.bilstm.lr=1e-3",
)
def run_command(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="a YAML file, or the name of a recipe that ships with softlabels"),
    ],
    out: Annotated[Path | None, typer.Option(help="the folder for everything; by default runs/RECIPE")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="change a key of the recipe; may be repeated"),
    ] = None,
    as_json: Json = False,
    cpu: Cpu = False,
) -> None:
    """Every stage of a recipe; what hasn't changed is skipped."""
    _run(recipe, out, changes or [], as_json=as_json, cpu=cpu)


def _run(name: str, out: Path | None, changes: Sequence[str], *, as_json: bool, cpu: bool) -> None:
    from softlabels.recipes import FederatedRecipe, MultiTaskRecipe, read_experiment

    recipe = read_experiment(name, changes=changes)  # a fault in it is told before anything heavy is loaded
    folder = out or Path("runs") / recipe.name
    if isinstance(recipe, FederatedRecipe):
        from softlabels.federated import run_federation

        parties = run_federation(recipe, out=folder, say=_say, cpu=cpu)
        if as_json:
            print_json(parties.to_dict())
        else:
            typer.echo(federation_table(parties))
        return
    from softlabels.run import run_recipe, run_tasks

    if isinstance(recipe, MultiTaskRecipe):
        result = run_tasks(recipe, out=folder, say=_say, cpu=cpu)
    else:
        result = run_recipe(recipe, out=folder, say=_say, cpu=cpu)
    if as_json:
        print_json(result.to_dict())
    else:
        typer.echo(recipe_table(result))


@app.command(
    "train-teacher",
    epilog="Examples:  softlabels train-teacher train.csv --model all-MiniLM-L6-v2 --out teacher   |   softlabels "
    "train-teacher train.csv --model bert-mini --from-scratch --tokenizer bert-base-chinese --out teacher   |   "
    "softlabels train-teacher texts.txt --model bert-base-uncased --task masked-lm --epochs 1 --out language-teacher",
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
    eval_split: Annotated[str | None, typer.Option(help="the split of the --eval corpus")] = None,
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
    _finish(report, as_json)


@app.command(
    "dump",
    epilog="Examples:  softlabels dump texts.csv --teacher ./teacher --out cache --capture logits --capture hidden:3,6 "
    "  |   softlabels dump images.csv --teacher ./vit --out cache   |   in a Slurm array of 8 jobs:  softlabels dump "
    "texts.csv --teacher ./teacher --out cache --part $((SLURM_ARRAY_TASK_ID + 1))/8   |   softlabels dump texts.csv "
    "--teacher ./teacher --out s3://bucket/cache --engine ray --address ray://head:10001 --workers 8",
)
def dump_command(
    corpus: CorpusArgument,
    teacher: Annotated[str, typer.Option(help="the fine-tuned teacher: a folder or a Hugging Face name")],
    out: Annotated[
        str,
        typer.Option(
            help="the cache; an unfinished one goes on, a finished one gets the fields it lacks. With --engine ray a "
            "folder that all machines share, or a URL: s3://bucket/cache"
        ),
    ],
    split: Annotated[
        str | None, typer.Option(help="which split(s) of the corpus, joined by +, e.g. train+unlabeled")
    ] = None,
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
    maskings: Annotated[int | None, typer.Option(min=1, help="of masked-lm: how often each text is masked")] = None,
    mask_rate: Annotated[float | None, typer.Option(help="of masked-lm: the share of tokens; by default 0.15")] = None,
    mask_seed: Annotated[int | None, typer.Option(min=0, help="of masked-lm: another one masks other tokens")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="tokens a text; by default what the teacher takes, at most 512")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="tokens in a batch, padding counted")] = None,
    shard_rows: Annotated[int | None, typer.Option(min=1, help="rows a file")] = None,
    dtype: Annotated[str | None, typer.Option(help="the teacher computes in float32, bfloat16 or float16")] = None,
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
    no_text: Annotated[bool, typer.Option("--no-text", help="leave the raw texts out of the cache")] = False,
    text: Text = None,
    label: Label = None,
    rows: Rows = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    cpu: Cpu = False,
) -> None:
    """STAGE 1: keep what a teacher says of a corpus."""
    from softlabels.config import DumpOptions, build_options

    masking = {"times": maskings, "rate": mask_rate, "seed": mask_seed}
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
        _say(f"{line}; another did its work")
    if report.truncated:
        _say(f"{report.truncated} of {report.rows} texts were longer than the teacher takes and were cut")
    if report.batch_tokens < options.batch_tokens:
        _say(f"memory ran out: batches of {report.batch_tokens} tokens were taken instead of {options.batch_tokens}")
    for field, count in report.clipped.items():
        _say(f"{count} values of {field} were beyond what {options.codec} holds and were clipped")
    if not report.rows:
        _say(f"part {part} has no rows: a part has whole files, of {options.shard_rows} rows each (--shard-rows)")
    if not report.complete:
        _say(f"{out} is complete once the other parts are in it; folders of parts are put together by combine --rows")
    _finish(report, as_json)


@app.command(
    "augment",
    epilog="Examples:  softlabels augment train.csv --out more.jsonl --teacher ./teacher   |   "
    "softlabels augment train.csv --out more.jsonl --method tinybert --mlm bert-base-uncased --word-vectors glove.txt",
)
def augment_command(
    corpus: CorpusArgument,
    out: Annotated[Path, typer.Option(help="the file that is written: .jsonl, .csv or .tsv; there must be none yet")],
    method: Annotated[
        str | None, typer.Option(help="distilled-bilstm (the default), tinybert, deletion or short-long; see above")
    ] = None,
    times: Annotated[
        int | None, typer.Option(min=1, help="samples a row; by default 20, of pairs 10 (tinybert: 20 of either)")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="another one makes other texts")] = None,
    no_originals: Annotated[bool, typer.Option("--no-originals", help="write the new rows only")] = False,
    language: Annotated[
        str | None, typer.Option(help="en, zh, or auto (the default): a text with a Chinese character is Chinese")
    ] = None,
    no_pos: Annotated[
        bool,
        typer.Option(
            "--no-pos",
            help="of distilled-bilstm: a word is replaced by any word, by its frequency, whatever its part of speech; "
            "needs no tagger, so English needs no extra package, and other languages with spaces are taken too",
        ),
    ] = False,
    teacher: Annotated[
        str | None,
        typer.Option(help="a masked word becomes the mask token of its tokenizer: a folder or a Hugging Face name"),
    ] = None,
    mask_token: Annotated[str | None, typer.Option(help="or name the mask token; by default [MASK]")] = None,
    mask_rate: Annotated[float | None, typer.Option(help="of distilled-bilstm: words masked; by default 0.1")] = None,
    pos_rate: Annotated[float | None, typer.Option(help="of distilled-bilstm: words replaced; by default 0.1")] = None,
    ngram_rate: Annotated[
        float | None, typer.Option(help="of distilled-bilstm: texts cut to an n-gram; by default 0.25")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="of tinybert: words replaced, by default 0.4; of deletion and short-long, by default 0.1"),
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="of tinybert: words that one may be replaced by; by default 15")
    ] = None,
    mlm: Annotated[
        str | None, typer.Option(help="of tinybert: the masked language model, a folder or a Hugging Face name")
    ] = None,
    word_vectors: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="of tinybert: word2vec, fastText or GloVe, as text, also compressed"),
    ] = None,
    vector_words: Annotated[
        int | None, typer.Option(min=2, help="of tinybert: only so many words of that file; by default 100,000")
    ] = None,
    span: Annotated[
        float | None,
        typer.Option(help="of short-long: words of a long disorder, or a share of the text; by default 20"),
    ] = None,
    task: Annotated[str | None, typer.Option(help="what the labels are, as for dump; by default a class a row")] = None,
    split: Annotated[str | None, typer.Option(help="which split(s) of the corpus, joined by +")] = None,
    text: Text = None,
    label: Label = None,
    rows: Rows = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    cpu: Cpu = False,
) -> None:
    """A larger transfer set: new texts made of a corpus's rows, for a teacher to label.

    distilled-bilstm masks words, replaces some by others of the same part of speech, and keeps an n-gram of some
    texts; tinybert replaces words by what a masked language model says (--mlm), or by the nearest word vectors
    (--word-vectors); deletion leaves words out; short-long swaps neighbours, and the halves of long spans.
    Chinese words, and parts of speech, need pip install 'softlabels[augment]'. The rows themselves come first, with
    their labels; new ones have none, and are called by the id of their row, ~ and a number. The same command writes
    the same bytes.
    """
    from softlabels.config import AugmentOptions, build_options

    given = {
        "method": method,
        "times": times,
        "seed": seed,
        "originals": False if no_originals else None,
        "language": language,
        "pos": False if no_pos else None,
        "mask_token": mask_token,
        "mask_rate": mask_rate,
        "pos_rate": pos_rate,
        "ngram_rate": ngram_rate,
        "rate": rate,
        "candidates": candidates,
        "mlm": mlm,
        "word_vectors": word_vectors,
        "vector_words": vector_words,
        "span": span,
    }
    options = build_options(
        AugmentOptions, {key: value for key, value in given.items() if value is not None}, where="augment"
    )
    from softlabels.augment import augment, check_task
    from softlabels.corpus import read_corpus

    data = read_corpus(corpus, split=split, text=text, label=label, rows=rows, task=check_task(task))
    report = augment(
        data,
        out=out,
        options=options,
        teacher=teacher,
        device="cpu" if cpu else None,
        trust_remote_code=trust_remote_code,
    )
    _finish(report, as_json)


@app.command(
    "plan",
    epilog="Example:  softlabels plan texts.csv --teacher ./teacher --out cache --capture logits --capture qkv:6",
)
def plan_command(
    corpus: CorpusArgument,
    teacher: Annotated[str, typer.Option(help="the fine-tuned teacher: a folder or a Hugging Face name")],
    out: Annotated[
        Path, typer.Option(help="where the cache would go: its free disk is told; nothing is written")
    ] = Path("."),
    split: Annotated[
        str | None, typer.Option(help="which split(s) of the corpus, joined by +, e.g. train+unlabeled")
    ] = None,
    capture: Annotated[list[str] | None, typer.Option(metavar="WHAT", help="as for dump; may be repeated")] = None,
    task: Annotated[str | None, typer.Option(help="as for dump: what the teacher was made for")] = None,
    rows_sample: Annotated[
        int,
        typer.Option(
            min=1, help="how many rows are tokenised, spread over the corpus by their length; 200 are 5 % off for maps"
        ),
    ] = 2000,
    epochs: Annotated[int, typer.Option(min=1, help="that a student trains: for when the cache has paid")] = 10,
    maskings: Annotated[int | None, typer.Option(min=1, help="of masked-lm: how often each text is masked")] = None,
    mask_rate: Annotated[float | None, typer.Option(help="of masked-lm: the share of tokens; by default 0.15")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="tokens a text; by default what the teacher takes, at most 512")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="tokens in a batch, padding counted")] = None,
    shard_rows: Annotated[int | None, typer.Option(min=1, help="rows a file")] = None,
    dtype: Annotated[str | None, typer.Option(help="the teacher computes in float32, bfloat16 or float16")] = None,
    codec: Annotated[
        str | None, typer.Option(help="float32, float16 (default), bfloat16, or int8 (not maps), as for dump")
    ] = None,
    no_text: Annotated[bool, typer.Option("--no-text", help="leave the raw texts out of the cache")] = False,
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

    masking = {key: value for key, value in {"times": maskings, "rate": mask_rate}.items() if value is not None}
    given = {
        "capture": capture or None,
        "task": task,
        "masking": masking or None,
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


@app.command(
    "import",
    epilog="Example:  softlabels import scored.parquet --out cache --logits scores --label-names no,yes "
    "--tokenizer bert-base-uncased",
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
    shard_rows: Annotated[int | None, typer.Option(min=1, help="rows a file")] = None,
    no_text: Annotated[bool, typer.Option("--no-text", help="leave the raw texts out of the cache")] = False,
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
        _say(f"{report.truncated} of {report.rows} texts were longer than --max-length and were cut")
    if report.zeros:
        _say(f"{report.zeros} probabilities are zero and were stored as 1.2e-38, the smallest that float32 has")
    _finish(report, as_json)


@app.command(
    "combine",
    epilog="Examples:  softlabels combine cache-a cache-b cache-c --out cache --mean probabilities --weights 2,1,1 "
    "  |   softlabels combine party-1 party-2 --out consensus --keep   |   "
    "softlabels combine cache-a cache-b --out cache --choose label   |   "
    "softlabels combine part-1 part-2 part-3 --out whole --rows",
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
    options = _combine_options(mean, weights, choose, keep=keep, where="combine")
    if rows and options.model_fields_set:
        raise ConfigError(f"--rows mixes nothing, so it takes no {_OPTION[min(options.model_fields_set)]}")
    from softlabels.cache.combine import combine
    from softlabels.cache.concatenate import concatenate

    report = concatenate(caches, out=out) if rows else combine(caches, out=out, options=options)
    if as_json:
        print_json(asdict(report))
    else:
        typer.echo(combine_table(report))


_OPTION = {"mean": "--mean", "weights": "--weights", "choose": "--choose", "keep": "--keep"}


def _combine_options(
    mean: str | None, weights: str | None, choose: str | None, *, keep: bool = False, where: str
) -> CombineOptions:
    from softlabels.config import CombineOptions, build_options

    given: dict[str, Any] = {"mean": mean, "choose": choose, "keep": keep or None}
    if weights is not None:
        try:
            given["weights"] = [float(part) for part in weights.split(",")]
        except ValueError:
            raise ConfigError(
                f"--weights {weights}: give numbers separated by commas, one a cache, e.g. 2,1,1"
            ) from None
    return build_options(CombineOptions, {key: value for key, value in given.items() if value is not None}, where=where)


@app.command(epilog="Examples:  softlabels info cache   |   softlabels info s3://bucket/sst2")
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


app.command(epilog=card.EXAMPLES)(card.card)
app.command(epilog=sign.EXAMPLES)(sign.sign)


@app.command(
    epilog="Examples:  softlabels verify cache   |   softlabels verify cache --field logits   |   "
    "softlabels verify cache --repair   |   softlabels verify cache --quick   |   "
    "softlabels verify cache --live ./teacher --rows 200   |   "
    "softlabels verify cache --live ./vit --corpus images.csv   |   softlabels verify cache --signer maker.pub"
)
def verify(
    cache: Annotated[Path, typer.Argument(metavar="CACHE")],
    field: Annotated[
        list[str] | None,
        typer.Option("--field", metavar="FIELD", help="check only this field and the examples; may be repeated"),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="remove the files that are proven bad, so that the dump command writes just these again"
        ),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="only whether all files are there and as long as they must be: seconds")
    ] = False,
    signer: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="hold it to a signature too: the public key of who made it, as its .pub file, its line ('ssh-ed25519 "
            "AAAA…') or its fingerprint (SHA256:…); a cache that is not signed by it is at fault",
        ),
    ] = None,
    live: Annotated[
        str | None,
        typer.Option(
            metavar="TEACHER",
            help="instead: run the cache's teacher (a folder or a Hugging Face name) again on some rows, in other "
            "batches than the dump's, and hold every field against it",
        ),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(metavar="CORPUS", help="of --live: the images that were dumped, for a cache of images holds none"),
    ] = None,
    split: Annotated[str | None, typer.Option(help="of --corpus: which split(s), joined by +, as for dump")] = None,
    text: Annotated[
        str | None, typer.Option("--text", metavar="COLUMN", help="of --corpus: the column with the image")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="of --live: so many random rows; by default 200")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="of --live: another one draws other rows")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    cpu: Cpu = False,
) -> None:
    """Whether a cache is whole: checksums, structure, and that all belongs together. Exit code 0 only if it is.

    With --live: whether it says what its teacher says. The teacher runs twice over the rows, in two batchings, and what
    lies between the two is the noise. A field is within its bounds where no value is farther from the live one than
    what the field's codec rounds it by, 4 times the largest noise, and 2^-17 of the largest value. Exit code 1 where a
    field is not. Files are only checked as far as these rows need them: verify without --live reads them all.
    """
    if live is not None:
        if repair:
            raise ConfigError("--live changes nothing: give --repair to a verify without it")
        if quick:
            raise ConfigError("--live runs the teacher: give --quick to a verify without it")
        if signer is not None:
            raise ConfigError("--live looks at some rows only: give --signer to a verify without it")
        _verify_live(
            cache,
            live,
            rows=200 if rows is None else rows,
            seed=seed or 0,
            corpus=None if corpus is None else _read_images(cache, corpus, split=split, text=text),
            fields=field or None,
            trust_remote_code=trust_remote_code,
            cpu=cpu,
            as_json=as_json,
        )
        return
    for option, given in (("--rows", rows), ("--seed", seed), ("--corpus", corpus)):
        if given is not None:
            raise ConfigError(f"{option} is for verify --live TEACHER: without it, every row is looked at")
    from softlabels.cache.sshsig import load_signers
    from softlabels.cache.verify import verify_cache

    signers = None if signer is None else load_signers(signer)
    verdict = verify_cache(cache, fields=field or None, repair=repair, signers=signers, quick=quick)
    if as_json:
        print_json({**asdict(verdict), "whole": verdict.whole})
    else:
        typer.echo(verdict_line(verdict))
    if not verdict.whole:
        raise typer.Exit(2)


def _read_images(cache: Path, corpus: str, *, split: str | None, text: str | None) -> Corpus:
    """What `cache` was dumped from; ConfigError where that was no images."""
    from softlabels.cache.format import read_manifest
    from softlabels.corpus import read_corpus
    from softlabels.types import IMAGES

    if read_manifest(cache).teacher.task != IMAGES:
        raise ConfigError(f"--corpus is for caches of images: cache {cache} holds the tokens that its teacher read")
    return read_corpus(corpus, split=split, text=text, task=IMAGES)


def _verify_live(
    cache: Path,
    teacher: str,
    *,
    rows: int,
    seed: int,
    corpus: Corpus | None,
    fields: list[str] | None,
    trust_remote_code: bool,
    cpu: bool,
    as_json: bool,
) -> None:
    from softlabels.fidelity import verify_live

    found = verify_live(
        cache,
        teacher=teacher,
        rows=rows,
        seed=seed,
        fields=fields,
        device="cpu" if cpu else None,
        trust_remote_code=trust_remote_code,
        corpus=corpus,
    )
    if as_json:
        print_json({**asdict(found), "within": found.within})
    else:
        typer.echo(fidelity_table(found))
    if not found.within:
        raise typer.Exit(1)


@app.command(
    "train-student",
    epilog="Examples:  softlabels train-student cache --student bilstm --out runs/bilstm "
    "--loss kl=0.7 --loss ce=0.3 --temperature 3   |   softlabels train-student cache-a cache-b cache-c --mean "
    "probabilities --student bilstm --out runs/taught-by-three   |   accelerate launch --multi_gpu --num_processes 4 "
    "-m softlabels train-student cache --student transformer --out runs/four   |   softlabels train-student "
    "s3://bucket/sst2 --student bilstm --out runs/from-s3",
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
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="an option of the student, e.g. layers=2; may be repeated"),
    ] = None,
    eval_corpus: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="CORPUS",
            help="a labelled corpus that picks the best epoch; by default a tenth of the rows is held out",
        ),
    ] = None,
    eval_split: Annotated[str | None, typer.Option(help="the split of the --eval corpus")] = None,
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
    lr: Annotated[float | None, typer.Option(help="the highest learning rate")] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="stop after so many epochs without a better score")
    ] = None,
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
    resume: Annotated[bool, typer.Option("--resume", help="go on with an interrupted run, to the same result")] = False,
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
    from softlabels.errors import ConfigError
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
    combining = _combine_options(mean, weights, choose, where="train-student")
    if len(caches) == 1 and combining.model_fields_set:
        raise ConfigError(f"{_OPTION[min(combining.model_fields_set)]} combines several caches, and one is given")
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
    corpus = None if eval_corpus is None else read_corpus(eval_corpus, split=eval_split, text=text, label=label)
    report = train_student(opened, out=out, options=options, validation=corpus, resume=resume, cpu=cpu)
    if is_first_process():
        _finish(report, as_json)


def _which_student(name: str) -> dict[str, Any]:
    """The kind of a new student, or the folder of one that is trained further."""
    from softlabels.students import STUDENT_NAMES

    if name in STUDENT_NAMES or not Path(name).is_dir():
        return {"student": name}
    from softlabels.runs import read_record

    return {"student": read_record(Path(name)).student, "from_run": name}


@app.command(
    "prune",
    epilog="Example:  softlabels prune runs/bilstm --magnitude 0.5 --out runs/sparse, then train-student cache "
    "--student runs/sparse --out runs/sparse-again",
)
def prune_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the run folder of a student")],
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
    _finish(report, as_json)


@app.command(
    "export",
    epilog="Example:  softlabels export runs/bilstm --int8 --out runs/int8   |   softlabels predict runs/int8 'A film'",
)
def export_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the run folder of a student")],
    out: Annotated[Path, typer.Option(help="the run folder for the exported student")],
    format: Annotated[str, typer.Option(help="onnx")] = "onnx",
    int8: Annotated[bool, typer.Option("--int8", help="8-bit weights (dynamic quantisation)")] = False,
    as_json: Json = False,
) -> None:
    """A student in ONNX, checked against PyTorch; predict and evaluate run it with ONNX Runtime (extra 'export')."""
    if format != "onnx":
        raise ConfigError(f"--format {format} can't be written: there is onnx")
    from softlabels.export import export

    _finish(export(run, out=out, int8=int8), as_json)


@app.command(
    "train-joint",
    epilog="Example:  softlabels train-joint cache --recipe joint --out runs/pair   |   softlabels evaluate "
    "runs/pair/global test.csv --with runs/pair/local",
)
def train_joint_command(
    cache: Annotated[Path, typer.Argument(metavar="CACHE")],
    recipe: Annotated[str, typer.Option(help="a recipe with a student that has 'joint', a YAML file or a name")],
    out: Annotated[Path, typer.Option(help="the folder for the two runs, global and local")],
    student: Annotated[str | None, typer.Option(help="which of the recipe's students, where it has several")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="change a key, e.g. students.pair.joint.couple.kl=0.5"),
    ] = None,
    eval_corpus: Annotated[
        str | None, typer.Option("--eval", metavar="CORPUS", help="a labelled corpus that picks the best epochs")
    ] = None,
    eval_split: Annotated[str | None, typer.Option(help="the split of the --eval corpus")] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with an interrupted run, to the same result")] = False,
    text: Text = None,
    label: Label = None,
    as_json: Json = False,
    cpu: Cpu = False,
) -> None:
    """STAGE 2: train two students together, each from the cache and from the other."""
    from softlabels.recipes import joint_of_recipe

    options = joint_of_recipe(recipe, student, changes=changes or [], seed=seed)
    from softlabels.cache import open_cache
    from softlabels.corpus import read_corpus
    from softlabels.joint import train_joint

    opened = open_cache(cache)
    corpus = None if eval_corpus is None else read_corpus(eval_corpus, split=eval_split, text=text, label=label)
    reports = train_joint(opened, out=out, options=options, validation=corpus, resume=resume, cpu=cpu)
    _finish_all(reports, as_json)


@app.command(
    "train-multitask",
    epilog="Example:  softlabels train-multitask --task library=cache-a --task kind=cache-b --student transformer "
    "--out runs/both",
)
def train_multitask_command(
    task: Annotated[
        list[str], typer.Option(metavar="NAME=CACHE", help="a task and its cache; once for each task, two or more")
    ],
    out: Annotated[Path, typer.Option(help="the folder for the runs, one a task")],
    student: Annotated[str | None, typer.Option(help="transformer, bilstm, word_average or lstm_attention")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="train as a recipe of several tasks says, a YAML file or a name (multitask)")
    ] = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=WEIGHT",
            help="of every task; may be repeated; by default teacher annealing, from the teacher to the labels",
        ),
    ] = None,
    temperature: Annotated[str | None, typer.Option(help="3 (by default 1), or 5:1")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="an option of the student, e.g. layers=2; may be repeated"),
    ] = None,
    power: Annotated[
        float | None, typer.Option(min=0, max=1, help="tasks are drawn ∝ their rows to this power (by default 0.75)")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    lr: Annotated[float | None, typer.Option(help="the highest learning rate")] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="stop after so many epochs without a better score")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with an interrupted run, to the same result")] = False,
    as_json: Json = False,
    cpu: Cpu = False,
) -> None:
    """STAGE 2: train one encoder with a head for each task, from a cache of each."""
    from softlabels.config import MultiTaskOptions, build_options, parse_losses, parse_options
    from softlabels.recipes import tasks_of_recipe

    if student is None and recipe is None:
        raise ConfigError("say what to train: --student transformer, or --recipe NAME")
    given: dict[str, Any] = {
        "student": student,
        "power": power,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "patience": patience,
        "seed": seed,
        "temperature": temperature,
        "losses": None if loss is None else parse_losses(loss),
    }
    start = {} if recipe is None else tasks_of_recipe(recipe).model_dump(exclude_unset=True)
    chosen = start.get("options", {}) | parse_options(option or [])
    values = start | {key: value for key, value in given.items() if value is not None} | {"options": chosen}
    options = build_options(MultiTaskOptions, values, where="train-multitask")
    folders = {name: str(folder) for name, folder in parse_options(task).items()}
    from softlabels.cache import open_cache
    from softlabels.multitask import train_multitask

    caches = {name: open_cache(folder) for name, folder in folders.items()}
    _finish_all(train_multitask(caches, out=out, options=options, resume=resume, cpu=cpu), as_json)


app.command("evaluate", epilog=evaluate_command.EXAMPLES)(evaluate_command.evaluate)
app.command("report", epilog=report_command.EXAMPLES)(report_command.report)
app.command("sweep", epilog=sweep.EXAMPLES)(sweep.sweep)


@app.command(
    "predict",
    epilog="Examples:  softlabels predict runs/bilstm 'What a film'   |   softlabels predict runs/bilstm - < texts.txt",
)
def predict_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the run folder of a student")],
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT ... | -",
            help="texts, or - to read a text a line from standard input; a tab parts a pair",
        ),
    ],
    as_json: Json = False,
) -> None:
    """The student's class for texts."""
    given = _read_texts(texts)
    from softlabels.predict import predict

    for prediction in predict(run, given):
        if as_json:
            print_json(asdict(prediction))
        else:
            typer.echo(f"{prediction.label}\t{prediction.probability:.3f}\t{prediction.text}")


def _read_texts(texts: Sequence[str]) -> list[str | tuple[str, str]]:
    lines = _read_lines() if list(texts) == ["-"] else list(texts)
    if not lines or any(not part.strip() for line in lines for part in line.split("\t", 1)):
        raise ConfigError(
            "predict needs texts, none of them empty: name them, or give - and one a line on standard input"
        )
    for line in lines:
        try:
            line.encode()
        except UnicodeEncodeError:  # how Python hands over bytes of the command line that are not UTF-8
            raise ConfigError(f"the text {line!r} is not UTF-8: convert it first") from None
    pairs = [line.split("\t", 1) for line in lines]
    return [(pair[0], pair[1]) if len(pair) == 2 else pair[0] for pair in pairs]


def _read_lines() -> list[str]:
    """The lines of standard input; only a line feed ends one, since a text may hold any other separator."""
    if sys.stdin is None:  # closed by whoever started this process
        raise ConfigError("there is no standard input to read: name the texts instead of -")
    try:
        whole = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8 (byte {error.start}): convert it first") from None
    return [line.removesuffix("\r") for line in whole.removesuffix("\n").split("\n")] if whole else []


app.command("push", epilog=PUSH_EXAMPLES)(push_command)
app.command("pull", epilog=PULL_EXAMPLES)(pull_command)


def _a_line_each(examples: str) -> str:
    """The examples of a command below one another, unbroken, so that they can be copied."""
    head, _, rest = examples.partition(":")
    first = f"{head}:  "
    return f"\b\n{first}" + f"\n{' ' * len(first)}".join(rest.strip().split("   |   "))  # \b: not to be wrapped


for _command in app.registered_commands:
    _command.epilog = _a_line_each(_command.epilog or "")


# -------------------------------------------------------------------------------------------------------- printing


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _finish(report: Any, as_json: bool) -> None:
    print_report(asdict(report), as_json=as_json)


def _finish_all(reports: Any, as_json: bool) -> None:
    """The reports of what trained together, by name."""
    facts = {name: asdict(report) for name, report in reports.items()}
    if as_json:
        print_json(facts)
    else:
        typer.echo("\n\n".join(f"{name}\n{show_facts(found)}" for name, found in facts.items()))


# ---------------------------------------------------------------------------------------------------------- errors


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code.

    0 done; 2 wrong usage or input; 130 Ctrl-C; 1 a fault of softlabels itself, or a cache that is not what its
    teacher says (verify --live).
    """
    # torch's threads wait for each other by spinning, which on a machine that does anything else beside is ten times
    # slower than sleeping; on an idle one it gains little. Read when torch is loaded; the user's own setting wins.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in given
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that can't show a sign is no reason to stop
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _OnInterrupt())
    code = 130
    try:
        code = _guarded([word for word in given if word != "--debug"], debug=debug)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:  # too late to be told
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to stop: it would only garble the end
    gc.freeze()  # nor to collect: Python would search torch's objects for most of a second
    sys.exit(code)


class _OnInterrupt:
    """What a Ctrl-C does. One pressed again at once is the same one: it would only hurt the tidying up."""

    def __init__(self) -> None:
        self.last = -math.inf

    def __call__(self, number: int, frame: FrameType | None) -> None:
        before, self.last = self.last, time.monotonic()
        if self.last - before > 1:
            raise KeyboardInterrupt


_RESUMED = ("train-student", "train-joint", "train-multitask")  # the commands that go on only if told to


def _guarded(arguments: list[str], *, debug: bool) -> int:
    """The exit code of a command line; whatever stopped it is told on stderr."""
    try:
        command = typer.main.get_command(app)
        # not app(arguments): that answers a Ctrl-C and a closed pipe itself, in its own ways
        with command.make_context("softlabels", list(arguments)) as context:
            command.invoke(context)
        if sys.stdout is not None:  # closed by whoever started this process
            sys.stdout.flush()
        return 0
    except typer.Exit as leaving:
        return leaving.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if _is_interrupt(error):
            again = "again with --resume" if arguments[:1] and arguments[0] in _RESUMED else "again"
            _say(f"\nstopped. What was committed is kept: give the same command {again} to go on")
            return 130
        if debug and not isinstance(error, TyperException):
            raise
        fault = _user_fault(error)
        if fault is None:
            _say(f"error: {type(error).__name__}: {error}\nThis is a fault of softlabels itself; --debug shows where")
            return 1
        _say(f"error: {fault}")
        return 2


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether a Ctrl-C is at the bottom of it: what it cut short may have failed on its way out."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt | typer.Abort):
            return True
        error = error.__cause__ or error.__context__
    return False


def _user_fault(error: BaseException) -> str | None:
    """What the user did or met, in words; None where softlabels itself is at fault."""
    if isinstance(error, TyperException):  # wrong usage
        path = getattr(getattr(error, "ctx", None), "command_path", "softlabels")
        return f"{error.format_message()}\n`{path} --help` shows what it takes"
    if isinstance(error, SoftlabelsError):
        return str(error)
    if isinstance(error, OSError):
        return _system_fault(error)
    told = re.search(r"\(os error (\d+)\)$", str(error))  # how Rust's libraries tell what the system said
    return _system_fault(OSError(int(told[1]), os.strerror(int(told[1])))) if told else None


def _system_fault(error: OSError) -> str:
    place = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{place}. What was committed is kept: make room and give the same command again"
    if error.errno == errno.EFBIG:
        return "a file became larger than is allowed here (ulimit -f). What was committed is kept"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write or read{place}: choose another folder"
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"a file is where a folder is needed{place}: choose another name"
    if error.errno == errno.EISDIR:
        return f"a folder is where a file is needed{place}: choose another name"
    return f"{error.strerror or error}{place}"


if __name__ == "__main__":
    main()
