"""`softlabels train-joint` and `train-multitask`: students that are trained together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from softlabels.commands.options import Cpu, EvalSplit, Json, Label, LearningRate, Patience, Resume, StudentOption, Text
from softlabels.commands.show import print_reports
from softlabels.errors import ConfigError

JOINT_EXAMPLES = (
    "Example:  softlabels train-joint cache --recipe joint --out runs/pair   |   softlabels evaluate "
    "runs/pair/global test.csv --with runs/pair/local"
)
MULTITASK_EXAMPLES = (
    "Example:  softlabels train-multitask --task library=cache-a --task kind=cache-b --student transformer "
    "--out runs/both"
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
    eval_split: EvalSplit = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    resume: Resume = False,
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
    print_reports(reports, as_json=as_json)


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
    option: StudentOption = None,
    power: Annotated[
        float | None, typer.Option(min=0, max=1, help="tasks are drawn ∝ their rows to this power (by default 0.75)")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    lr: LearningRate = None,
    patience: Patience = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    resume: Resume = False,
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
    print_reports(train_multitask(caches, out=out, options=options, resume=resume, cpu=cpu), as_json=as_json)
