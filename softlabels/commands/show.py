"""How commands print what they did."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import typer

from softlabels.tables import show_facts


def print_json(value: Any) -> None:
    """`value` as one JSON object."""
    typer.echo(json.dumps(_plain(value), ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    """`value` as JSON has it: a path is a text, and a number that isn't finite is null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def print_report(facts: Mapping[str, Any], *, as_json: bool) -> None:
    """A report's facts as a table for people, or as one JSON object."""
    if as_json:
        print_json(dict(facts))
    else:
        typer.echo(show_facts(dict(facts)))


def print_reports(reports: Mapping[str, Any], *, as_json: bool) -> None:
    """The reports (dataclasses) of what was made together, by name."""
    facts = {name: asdict(report) for name, report in reports.items()}
    if as_json:
        print_json(facts)
    else:
        typer.echo("\n\n".join(f"{name}\n{show_facts(found)}" for name, found in facts.items()))


def say(line: str) -> None:
    """A line for people, on stderr."""
    typer.echo(line, err=True)
