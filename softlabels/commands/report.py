"""`softlabels report`: one page that shows which student to ship."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softlabels.commands.show import print_json
from softlabels.tables import show_size

EXAMPLES = (
    "Examples:  softlabels report runs/quickstart --out report.html   |   "
    "softlabels report runs/t1 runs/t3 runs/t8 --out report.html --title 'Which temperature?'"
)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN ...", help="evaluated runs, or folders with such beneath them (of run, of sweep)"),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="the page")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="of the page")] = None,
    corpus: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="which evaluation, where runs have several: its name or how it begins"),
    ] = None,
    differing: Annotated[
        int,
        typer.Option("--rows", min=0, max=1000, help="so many rows are shown in which student and teacher differ most"),
    ] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="print what was found as one JSON object")] = False,
) -> None:
    """One self-contained HTML page from evaluated runs: which student to ship, and why.

    Runs that differ in their seed alone are one student. The page has a table, accuracy against latency and size with
    the Pareto front, curves along temperatures, weights and other settings, training curves, confusion matrices,
    reliability diagrams, the rows in which student and teacher differ most, and where everything comes from. It asks
    for nothing from the network, and shows texts of the corpus: --rows 0 leaves them out.
    """
    from softlabels.report import report as write

    found = write(runs, out=out, title=title, corpus=corpus, differing=differing)
    if as_json:
        print_json(found.to_dict())
        return
    for path, why in list(found.left_out.items())[:5]:
        typer.echo(f"not shown: {path}: {why}", err=True)
    if len(found.left_out) > 5:
        typer.echo(f"and {len(found.left_out) - 5} more, which the page lists", err=True)
    typer.echo(f"ship {found.ship}: accuracy {100 * found.accuracy:.1f} % on {found.rows:,} rows of {found.corpus}")
    if found.as_good:
        typer.echo(f"not distinguishable from it: {', '.join(found.as_good)}")
    typer.echo(f"{found.out}: {found.students} students of {found.runs} runs, {show_size(found.bytes)}")
