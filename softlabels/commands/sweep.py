"""`softlabels sweep`: many students from one cache, and a table of them, the best first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from softlabels.commands.options import Cpu, EvalSplit, Json, Label, Text, ray_options
from softlabels.commands.show import print_json
from softlabels.errors import ConfigError
from softlabels.tables import lay_out

EXAMPLES = (
    "Examples:  softlabels sweep cache --student bilstm --temperature 1,2,4,8 --loss kl=0.3,0.5,0.7 --loss ce=0.3 "
    "--seeds 0,1,2 --eval dev.csv --out sweeps/t   |   softlabels sweep cache --recipe hinton --random 20 --set "
    "lr=1e-4..1e-2:log --set options.hidden_size=50..300 --eval dev.csv --out sweeps/random   |   softlabels sweep "
    "cache --student bilstm --optuna 30 --temperature 1..10 --out sweeps/tpe   |   softlabels sweep /shared/cache "
    "--student bilstm --temperature 1,2,4 --out /shared/sweep --engine ray --address auto"
)
Values = "V,V,..."


def sweep(
    caches: Annotated[
        list[Path],
        typer.Argument(metavar="CACHE ...", help="a cache, or what several say together"),
    ],
    out: Annotated[Path, typer.Option(help="the folder of the sweep; a stopped one goes on")],
    student: Annotated[
        str | None,
        typer.Option(metavar=Values, help="bilstm, transformer, linear, …; with --recipe names of its students"),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="start from a recipe's student: a YAML file or a name (hinton, pkd-skip, …)")
    ] = None,
    temperature: Annotated[str | None, typer.Option(metavar=Values, help="e.g. 1,2,4 or 2,5:1")] = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=V,V,...", help="a loss and its weights, e.g. kl=0.3,0.7; may be repeated"),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=V,V,...", help="an option of the student; may be repeated"),
    ] = None,
    lr: Annotated[str | None, typer.Option(metavar=Values, help="highest learning rates")] = None,
    epochs: Annotated[str | None, typer.Option(metavar=Values)] = None,
    batch_size: Annotated[str | None, typer.Option(metavar=Values)] = None,
    optimizer: Annotated[str | None, typer.Option(metavar=Values, help="adamw, sgd, adadelta")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=V,V,...",
            help="any key of a student in a recipe, by a dotted path: rows=1000,5000, phases.0.lr=1e-4,1e-3, "
            "'losses={kl: 1},{kl: 0.7, ce: 0.3}'; may be repeated",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="each point is trained with each of them")] = "0",
    random: Annotated[
        int | None,
        typer.Option("--random", min=1, metavar="N", help="try N random points; ranges: LOW..HIGH, LOW..HIGH:log"),
    ] = None,
    optuna: Annotated[
        int | None,
        typer.Option("--optuna", min=1, metavar="N", help="let Optuna's TPE choose N points by what came of others"),
    ] = None,
    search_seed: Annotated[int, typer.Option(min=0, help="of --random and --optuna")] = 0,
    eval_corpus: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="CORPUS",
            help="labelled rows that choose: of each trial the best epoch, and of the trials the best, by the metric "
            "on these rows; by default each trial holds a tenth of the cache out",
        ),
    ] = None,
    eval_split: EvalSplit = None,
    test_corpus: Annotated[
        str | None,
        typer.Option("--test", metavar="CORPUS", help="labelled rows that are scored too, and choose nothing"),
    ] = None,
    test_split: Annotated[str | None, typer.Option(help="the split of the --test corpus")] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="accuracy (by default with --eval) or macro_f1, on the --eval rows; without it also agreement with "
            "the teacher (then the default) and loss, on the rows held out"
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="trials at once, each on its share of the cores; by default as many as cores (GPU: 1)"
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="local|ray", help="ray: trials on the workers of a Ray cluster (pip install 'softlabels[ray]')"
        ),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="of the Ray cluster, as for dump: local (default), auto, ray://HOST:10001")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="of the Ray cluster; by default as many as fit")] = None,
    gpus_per_worker: Annotated[float | None, typer.Option(help="0.5: two trials share one; 0: on the CPU")] = None,
    cpus_per_worker: Annotated[float | None, typer.Option(help="of a trial, and its threads; by default 1")] = None,
    keep: Annotated[int | None, typer.Option(min=1, help="keep the run folders of the best N trials only")] = None,
    text: Text = None,
    label: Label = None,
    as_json: Json = False,
    cpu: Cpu = False,
) -> None:
    """STAGE 2, many times: students over a grid, random points or Optuna's, and a table of them, the best first.

    Options that take V,V,... are swept over those values; one value is shared by all trials. Each trial is an ordinary
    run in OUT/trials, and a row of OUT/results.parquet. The same command again goes on: done trials are skipped, failed
    ones tried again. A trial that fails leaves its error in its row, and the exit code is 0 as long as any is done.
    """
    from softlabels.config import build_options
    from softlabels.sweeping.space import Choice, Range, SweepOptions, check_space, parse_axis
    from softlabels.sweeping.space import Space as SpaceOf

    named = {
        "student": student,
        "temperature": temperature,
        "lr": lr,
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
    }
    given = [(key, value) for key, value in named.items() if value is not None]
    losses = _pairs("--loss", loss or [], bare="1")
    given += [(f"losses.{name}", value) for name, value in losses]
    given += [(f"options.{key}", value) for key, value in _pairs("--option", option or [])]
    given += _pairs("--set", changes or [])
    parsed = [parse_axis(key, value) for key, value in given]
    fixed: dict[str, Any] = {a.key: a.values[0] for a in parsed if isinstance(a, Choice) and len(a.values) == 1}
    axes = [axis for axis in parsed if isinstance(axis, Range) or len(axis.values) > 1]
    if losses:  # these and no others
        fixed["losses"] = {}
    options = build_options(
        SweepOptions,
        {
            "search": "optuna" if optuna else "random" if random else "grid",
            "points": optuna or random,
            "search_seed": search_seed,
            "seeds": list(_choice(parse_axis("--seeds", seeds))),
            "metric": metric,
            "keep": keep,
        },
        where="sweep",
    )
    if optuna and random:
        raise ConfigError("--random and --optuna are two ways of searching: give one")
    if len(parsed) != len({axis.key for axis in parsed}):
        doubled = next(axis.key for axis in parsed if [other.key for other in parsed].count(axis.key) > 1)
        raise ConfigError(f"'{doubled}' is given twice: list its values in one place")
    check_space(SpaceOf(tuple(axes), fixed, recipe), options)  # before anything heavy is imported
    ray = ray_options(
        engine,
        {
            "address": address,
            "workers": workers,
            "gpus_per_worker": gpus_per_worker,
            "cpus_per_worker": cpus_per_worker,
        },
        command="sweep",
        cpu=cpu,
    )
    if ray is not None and jobs is not None:
        raise ConfigError("--jobs is of this machine: with --engine ray give --workers")
    if ray is not None and optuna is not None:
        raise ConfigError("Optuna chooses by what came before, one trial at a time: give --optuna without --engine ray")

    from softlabels.corpus import read_corpus
    from softlabels.sweep import sweep as run_sweep

    evaluated = None if eval_corpus is None else read_corpus(eval_corpus, split=eval_split, text=text, label=label)
    tested = None if test_corpus is None else read_corpus(test_corpus, split=test_split, text=text, label=label)
    result = run_sweep(
        caches,
        out=out,
        axes={axis.key: axis if isinstance(axis, Range) else axis.values for axis in axes},
        fixed=fixed,
        recipe=recipe,
        options=options,
        validation=evaluated,
        test=tested,
        jobs=jobs,
        cpu=cpu,
        ray=ray,
        say=lambda line: typer.echo(line, err=True),
    )
    print_json(result.to_dict()) if as_json else typer.echo(sweep_table(result))
    if result.failed:
        typer.echo(
            f"warning: {len(result.failed)} of {len(result.trials)} trials failed; their errors are in "
            f"{result.results}, column error. The same command tries them again",
            err=True,
        )


def _pairs(name: str, items: list[str], *, bare: str | None = None) -> list[tuple[str, str]]:
    """KEY=VALUES of an option that may be repeated."""
    pairs = []
    for item in items:
        key, equals, values = item.partition("=")
        if not key or not (equals or bare):
            raise ConfigError(f"{name} {item} is not KEY=VALUES, for example {name} lr=1e-3,1e-4")
        pairs.append((key, values if equals else str(bare)))
    return pairs


def _choice(axis: Any) -> tuple[Any, ...]:
    if not hasattr(axis, "values"):
        raise ConfigError("--seeds: list them, 0,1,2; a range is for keys of the student")
    return axis.values


def sweep_table(result: Any) -> str:
    """A line for each point of the sweep, the best first; mean ± sample spread over its seeds."""
    names = [name for name in ("accuracy", "macro_f1", "agreement", "loss") if _has(result, name)]
    names.sort(key=lambda name: name != result.metric)
    names += [name for name in ("test_accuracy", "test_macro_f1") if _has(result, name)]
    keys = [key for key in result.keys]
    head = [*(keys or ["point"]), *(name.replace("_", " ") for name in names), "n", "parameters", "train s"]
    rows = []
    for group in result.groups:
        said = [_text(group.changes[key]) for key in keys] or [group.point]
        count = f"{group.trials}" + (f" ({group.failed} failed)" if group.failed else "")
        size = f"{group.mean['parameters']:,.0f}" if "parameters" in group.mean else "–"
        seconds = f"{group.mean['train_seconds']:.1f}" if "train_seconds" in group.mean else "–"
        rows.append([*said, *(_figure(group, name) for name in names), count, size, seconds])
    where = "on the --eval rows" if not _has(result, "agreement") and not _has(result, "loss") else "on held-out rows"
    test = " Test figures choose nothing." if _has(result, "test_accuracy") else ""
    several = max(group.trials for group in result.groups) > 1
    return (
        f"{lay_out(head, rows)}\n\nSorted by {result.metric.replace('_', ' ')} {where}, which chose each trial's epoch "
        f"too.{test}{' Mean ± sample standard deviation over n seeds.' if several else ''} Shares in %.\n"
        f"{len(result.trials)} trials ({result.skipped} done before) in {result.seconds:.0f} s: {result.results}; "
        f"runs in {result.out}/trials"
    )


def _has(result: Any, name: str) -> bool:
    return any(name in group.mean for group in result.groups)


def _figure(group: Any, name: str) -> str:
    if name not in group.mean:
        return "–"
    scale, digits = (1, 4) if name == "loss" else (100, 1)
    spread = group.spread[name]
    return f"{scale * group.mean[name]:.{digits}f}" + ("" if spread is None else f" ± {scale * spread:.{digits}f}")


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
