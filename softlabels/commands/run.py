"""`softlabels run` and `softlabels demo`: every stage of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from softlabels.commands.options import Cpu, Json
from softlabels.commands.show import print_json, say
from softlabels.tables import federation_table, recipe_table

DEMO_EXAMPLES = "Example:  softlabels demo"
RUN_EXAMPLES = (
    "Examples:  softlabels run quickstart --out runs/try   |   softlabels run my.yaml --set students.bilstm.lr=1e-3"
)


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

        parties = run_federation(recipe, out=folder, say=say, cpu=cpu)
        if as_json:
            print_json(parties.to_dict())
        else:
            typer.echo(federation_table(parties))
        return
    from softlabels.run import run_recipe, run_tasks

    if isinstance(recipe, MultiTaskRecipe):
        result = run_tasks(recipe, out=folder, say=say, cpu=cpu)
    else:
        result = run_recipe(recipe, out=folder, say=say, cpu=cpu)
    if as_json:
        print_json(result.to_dict())
    else:
        typer.echo(recipe_table(result))
