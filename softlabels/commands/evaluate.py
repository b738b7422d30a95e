"""`softlabels evaluate`: how good a student is, how near to its teacher, how large and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softlabels.commands.options import CorpusArgument, Json, Label, Rows, RunFolder, Text
from softlabels.commands.show import print_json
from softlabels.errors import ConfigError
from softlabels.tables import evaluation_table, show_facts

if TYPE_CHECKING:
    from softlabels.corpus import Corpus

EXAMPLES = (
    "Examples:  softlabels evaluate runs/bilstm test.csv --cache cache-test   |   "
    "softlabels evaluate runs/bilstm test.csv --against runs/other   |   softlabels evaluate runs/gpt held-out.txt"
)


def evaluate(
    run: RunFolder,
    corpus: CorpusArgument,
    cache: Annotated[
        Path | None,
        typer.Option(help="a cache of this corpus: adds agreement with the teacher, its accuracy, its latency"),
    ] = None,
    others: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="RUN", help="average its probabilities with those of RUN; may be repeated"),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN", help="McNemar's test against RUN on the same rows; may be repeated"),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="which split(s) of the corpus, joined by +; a folder's default is train"),
    ] = None,
    text: Text = None,
    label: Label = None,
    rows: Rows = None,
    bins: Annotated[int, typer.Option(min=1, max=1000, help="of the calibration error")] = 15,
    resamples: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="of the rows, for the bootstrap intervals; 0: no intervals")
    ] = 1000,
    level: Annotated[float, typer.Option(help="of the intervals, above 0 and below 1")] = 0.95,
    seed: Annotated[int, typer.Option(help="of the resamples")] = 0,
    keep: Annotated[
        bool, typer.Option("--keep/--no-keep", help="leave figures and answers in RUN/evaluations, for `report`")
    ] = True,
    texts: Annotated[bool, typer.Option("--texts/--no-text", help="keep the texts with the answers")] = True,
    as_json: Json = False,
) -> None:
    """Quality per class, or perplexity; intervals, calibration, tests, slices; fidelity; size; latency.

    Intervals are percentile bootstraps over the rows. The calibration error (ECE) says how far a student is from being
    as right as it is sure. McNemar's test tells whether two runs, or student and teacher, differ by more than chance.
    What is found stays in RUN/evaluations (with the texts, but for --no-text), where `softlabels report` reads it.
    """
    from softlabels.corpus import read_corpus
    from softlabels.runs import read_record
    from softlabels.types import LANGUAGE_MODELS

    task = read_record(run).task
    data = read_corpus(corpus, split=split, text=text, label=label, rows=rows, task=task)
    if task in LANGUAGE_MODELS:
        if others or against:
            option = "--with averages" if others else "--against tests"
            raise ConfigError(f"{option} the classes of runs, and {run} is a {task}: leave it out")
        _evaluate_language_model(run, data, cache, as_json=as_json)
        return
    from pydantic import ValidationError

    from softlabels.cache import open_cache
    from softlabels.config import EvaluateOptions, explain
    from softlabels.evaluate import evaluate as score

    try:
        options = EvaluateOptions(bins=bins, resamples=resamples, level=level, seed=seed, keep=keep, texts=texts)
    except ValidationError as error:
        raise ConfigError(explain(error, where="evaluate")) from None
    found = score(
        run,
        data,
        cache=None if cache is None else open_cache(cache),
        others=others or (),
        against=against or (),
        options=options,
        say=lambda line: typer.echo(f"warning: {line}", err=True),
    )
    print_json(found.to_dict()) if as_json else typer.echo(evaluation_table(found))


def _evaluate_language_model(run: Path, corpus: Corpus, cache: Path | None, *, as_json: bool) -> None:
    from softlabels.cache import open_cache
    from softlabels.perplexity import evaluate_language_model

    found = evaluate_language_model(run, corpus, cache=None if cache is None else open_cache(cache))
    if as_json:
        print_json(found.to_dict())
        return
    facts: dict[str, Any] = {"rows": found.rows, "tokens predicted": found.targets, "perplexity": found.perplexity}
    if found.fidelity is not None:
        facts |= {
            "KL to the teacher": found.fidelity.kl,
            "agreement with the teacher": found.fidelity.agreement,
            "teacher's perplexity": found.fidelity.teacher_perplexity,
        }
    typer.echo(show_facts(facts | {"parameters": f"{found.parameters:,}", "bytes": found.bytes}))
